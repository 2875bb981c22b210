// Calls `body<T, VECTOR_BYTES>` for the dtype given, compiled for the instruction set of this machine.
#pragma once
#include <cstdlib>
#include <new>

#include "convert.h"
#include "kernels.h"

namespace eap {

template <template <class, int> class Body, int BYTES, class Args>
EAP_INLINE void by_dtype(Dtype dtype, const Args& args, int64_t task) {
  switch (dtype) {
    case Dtype::f64: return Body<double, BYTES>::run(args, task);
    case Dtype::f32: return Body<float, BYTES>::run(args, task);
    case Dtype::bf16: return Body<bf16, BYTES>::run(args, task);
    case Dtype::f16: return Body<f16, BYTES>::run(args, task);
  }
}

#ifdef EAP_X86_LEVELS
template <template <class, int> class Body, class Args>
EAP_TARGET_V4 void level_v4(Dtype dtype, const Args& args, int64_t task) {
  by_dtype<Body, 64>(dtype, args, task);
}
template <template <class, int> class Body, class Args>
EAP_TARGET_V3 void level_v3(Dtype dtype, const Args& args, int64_t task) {
  by_dtype<Body, 32>(dtype, args, task);
}
#endif

template <template <class, int> class Body, class Args>
void dispatch(Dtype dtype, const Args& args, int64_t task) {
#ifdef EAP_X86_LEVELS
  if (isa() >= Isa::v4) return level_v4<Body>(dtype, args, task);
  if (isa() == Isa::v3) return level_v3<Body>(dtype, args, task);
#endif
  by_dtype<Body, 16>(dtype, args, task);
}

// A buffer that a thread keeps between calls, so that tasks do not pay for fresh pages.
template <class T> T* scratch(int64_t count) {
  struct Buffer {
    void* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  const int64_t bytes = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, bytes);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return static_cast<T*>(buffer.data);
}

}  // namespace eap
