// All kernels, as one unit of compilation.
#include "attention.cu"
#include "joint_attention.cu"
