// All kernels, for the emulation.
#include "../kernels.cu"
