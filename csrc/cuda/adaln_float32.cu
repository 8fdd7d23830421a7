// All in float32.
#include "adaln_kernels.cuh"

template void etude::forward_of<float, float>(const AdalnForward&, const Place&);
template void etude::backward_of<float, float>(const AdalnBackward&, const Place&);
