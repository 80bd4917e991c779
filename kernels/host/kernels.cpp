// The kernels for the emulation, a unit of its own: its accesses to memory are watched, see emulation_races.h.
#include "../kernels.cu"
#include "faults.h"

extern "C" void pentimento_know_kernels() {}
