// All kernels, as one unit of compilation.
#include "attention.cu"
#include "conv.cu"
#include "elementwise.cu"
#include "hopper.cu"
#include "joint_attention.cu"
#include "latents.cu"
#include "linear.cu"
#include "rows.cu"
