// All in float16.
#include "adaln_kernels.cuh"

template void etude::forward_of<__half, __half>(const AdalnForward&, const Place&);
template void etude::backward_of<__half, __half>(const AdalnBackward&, const Place&);
