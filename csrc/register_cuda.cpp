// The operators for the CUDA dispatch key, built where nvcc was found: checks, workspace, device and stream, then the
// kernels. No CUDA header, and nothing that needs a CUDA driver or a CUDA build of torch to load.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cuda/kernels.h"
#include "tensors.h"

// Lives in torch's CUDA library; null beside a torch without one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace eap::cuda {
namespace {

// Plans the kernel and runs it on the tensors' device and current stream, in a workspace of torch's allocator, which
// hands the memory on in the order of the stream.
template <class Kernel> void run(const char* op, Kernel& kernel, const Tensor& like) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": expected a torch with CUDA, got one without");
  const torch::stable::accelerator::DeviceGuard guard(kernel.device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(kernel.device, &stream));
  kernel.plan();
  Tensor workspace = torch::stable::new_empty(like, {kernel.workspace()}, ScalarType::Byte);
  kernel.run(workspace.mutable_data_ptr(), static_cast<CUstream_st*>(stream));
}

void check_device(const char* op, const char* name, const Tensor& x, const Tensor& delta) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == delta.get_device_index(), op, ": expected ", name,
                  " on delta's device, got another");
}

void edge_scores(Tensor delta, Tensor grad, Tensor reach, Tensor out, std::optional<Tensor> segments, bool tf32) {
  const char* op = "edge_scores";
  const EdgeScoresRest rest = check_edge_scores(op, delta, grad, reach, out, segments);
  check_device(op, "delta", delta, delta);
  check_device(op, "grad", grad, delta);
  check_device(op, "out", out, delta);
  EdgeScores kernel{view(delta),
                    view(grad),
                    rest.dtype,
                    tf32,
                    rest.reach.data(),
                    rest.segment_data(),
                    out.mutable_data_ptr(),
                    {rest.out_stride[0], rest.out_stride[1], rest.out_stride[2]},
                    delta.get_device_index()};
  run(op, kernel, delta);
}

Tensor masked_read(Tensor base, Tensor delta, Tensor mask) {
  const char* op = "masked_read";
  const MaskedReadRest rest = check_masked_read(op, base, delta, mask);
  check_device(op, "delta", delta, delta);
  check_device(op, "base", base, delta);
  check_device(op, "mask", mask, delta);
  Tensor out = torch::stable::new_empty(delta, {mask.size(1), delta.size(1), delta.size(2)});
  MaskedRead kernel{view(delta),
                    rest.base,
                    rest.dtype,
                    mask.const_data_ptr(),
                    rest.mask_dtype,
                    {mask.stride(0), mask.stride(1)},
                    out.mutable_data_ptr(),
                    delta.get_device_index()};
  run(op, kernel, delta);
  return out;
}

}  // namespace
}  // namespace eap::cuda

STABLE_TORCH_LIBRARY_IMPL(eap_kernels, CUDA, m) {
  m.impl("edge_scores", TORCH_BOX(&eap::cuda::edge_scores));
  m.impl("masked_read", TORCH_BOX(&eap::cuda::masked_read));
}
