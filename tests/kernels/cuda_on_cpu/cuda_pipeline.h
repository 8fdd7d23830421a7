// cp.async: a copy into shared memory that has happened once it is waited for, and not before.
#pragma once
#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  cuda_on_cpu::copy_later(to, from, bytes);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t left) { cuda_on_cpu::wait_copies(left); }
