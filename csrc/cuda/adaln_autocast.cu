// A float32 residual stream (x, out) with bfloat16 branches (h, y): what autocast makes.
#include "adaln_kernels.cuh"

template void etude::forward_of<float, __nv_bfloat16>(const AdalnForward&, const Place&);
template void etude::backward_of<float, __nv_bfloat16>(const AdalnBackward&, const Place&);
