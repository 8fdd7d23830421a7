// All in bfloat16.
#include "adaln_kernels.cuh"

template void etude::forward_of<__nv_bfloat16, __nv_bfloat16>(const AdalnForward&, const Place&);
template void etude::backward_of<__nv_bfloat16, __nv_bfloat16>(const AdalnBackward&, const Place&);
