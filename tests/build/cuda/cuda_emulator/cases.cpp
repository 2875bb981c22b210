// `cases scores 0 100`: runs an operator's kernels on random inputs, one seed after the other, against sums in double.
// Fails at the first difference; at the end prints how many cases took which path, as JSON.
#include "csrc/cuda/kernels.h"
#include "emulator.h"

#include <sys/mman.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

using namespace eap;

namespace {

std::mt19937 numbers;
std::string about;  // the case that runs
std::map<std::string, int> seen;

int64_t draw(int64_t low, int64_t high) { return low + int64_t(numbers() % uint64_t(high - low + 1)); }
bool coin() { return draw(0, 1) == 1; }
double normal() { return std::normal_distribution<double>()(numbers); }
void check(bool condition, const std::string& what) {
  if (condition) return;
  fprintf(stderr, "%s: %s\n", about.c_str(), what.c_str());
  exit(1);
}

double read(Dtype dtype, const void* data, int64_t i) {
  switch (dtype) {
    case Dtype::f64: return static_cast<const double*>(data)[i];
    case Dtype::f32: return static_cast<const float*>(data)[i];
    case Dtype::bf16: return float(static_cast<const __nv_bfloat16*>(data)[i]);
    default: return float(static_cast<const __half*>(data)[i]);
  }
}
void write(Dtype dtype, void* data, int64_t i, double x) {
  switch (dtype) {
    case Dtype::f64: static_cast<double*>(data)[i] = x; break;
    case Dtype::f32: static_cast<float*>(data)[i] = float(x); break;
    case Dtype::bf16: static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(x)); break;
    default: static_cast<__half*>(data)[i] = __float2half_rn(float(x));
  }
}
double roundoff(Dtype dtype) {
  return dtype == Dtype::f64 ? 0x1p-53 : dtype == Dtype::f32 ? 0x1p-24 : dtype == Dtype::bf16 ? 0x1p-8 : 0x1p-11;
}

double to_tf32(double x) {
  const double unit = std::ldexp(1.0, std::ilogb(x) - 10);
  return std::isfinite(x) && x != 0 ? std::round(x / unit) * unit : x;
}

// Memory of which only the pages that are touched exist.
std::shared_ptr<void> allocate(int64_t bytes) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
  check(memory != MAP_FAILED, "no memory");
  return {memory, [bytes](void* p) { munmap(p, size_t(bytes)); }};
}

constexpr int64_t kFar = (int64_t(1) << 31) + 16;

// A tensor [A, B, C] of normal values, all else in its memory NaN.
struct Tensor {
  Dtype dtype;
  int64_t size[3], stride[3];
  std::shared_ptr<void> memory;

  enum Layout { kContiguous, kPadded, kTokensFirst, kReversed, kEveryOther, kBroadcast, kFar0, kFar1, kFar2, kLayouts };

  Tensor(Dtype dtype_, int64_t a, int64_t b, int64_t c, int64_t layout) : dtype(dtype_), size{a, b, c} {
    const int64_t padded = (c + 15) / 8 * 8;
    switch (layout) {
      case kPadded: lay((b + 1) * padded, padded, 1); break;
      case kTokensFirst: lay(c, a * c, 1); break;
      case kReversed: lay(1, a, b * a); break;
      case kEveryOther: lay((b + 2) * (2 * c + 1), 2 * c + 1, 2); break;
      case kBroadcast: lay(c, 0, 1); break;
      case kFar0: lay(kFar, c, 1); break;
      case kFar1: lay(c, kFar, 1); break;
      case kFar2: lay(b, 1, kFar); break;
      default: lay(b * c, c, 1);
    }
    int64_t elements = 64;
    for (int i = 0; i < 3; ++i) elements += std::max<int64_t>(size[i] - 1, 0) * stride[i];
    memory = allocate(elements * bytes_of(dtype));
    for (int64_t i = 0; layout < kFar0 && i < elements; ++i) write(dtype, memory.get(), i, NAN);
    each([&](int64_t i, int64_t, int64_t, int64_t) { write(dtype, memory.get(), i, normal()); });
  }
  void lay(int64_t a, int64_t b, int64_t c) { stride[0] = a, stride[1] = b, stride[2] = c; }
  template <class Visit> void each(const Visit& visit) const {
    for (int64_t a = 0; a < size[0]; ++a)
      for (int64_t b = 0; b < size[1]; ++b)
        for (int64_t c = 0; c < size[2]; ++c) visit(a * stride[0] + b * stride[1] + c * stride[2], a, b, c);
  }
  void poison(int64_t row) {
    each([&](int64_t i, int64_t a, int64_t, int64_t) { if (a == row) write(dtype, memory.get(), i, NAN); });
  }
  // The values one after the other.
  std::vector<double> values() const {
    std::vector<double> x;
    each([&](int64_t i, int64_t, int64_t, int64_t) { x.push_back(read(dtype, memory.get(), i)); });
    return x;
  }
  View view() const { return {memory.get(), {size[0], size[1], size[2]}, {stride[0], stride[1], stride[2]}}; }
};

// Half of the time a layout whose rows are aligned, so that pieces of 16 bytes, and TMA, are used.
int64_t draw_layout(bool aligned) { return aligned ? draw(0, 2) : draw(0, Tensor::kLayouts - 1); }

struct Workspace {
  std::shared_ptr<void> memory;
  explicit Workspace(int64_t bytes) : memory(allocate(bytes + 1)) { memset(memory.get(), 0xFF, size_t(bytes)); }
};

void scores() {
  // A third of the cases is for the TMA and wgmma kernel.
  const bool hopper = draw(0, 2) == 0, aligned = hopper || coin(), segmented = coin();
  const Dtype dtype = Dtype(draw(hopper ? 1 : 0, 3)), wide = accumulation(dtype);
  const bool tf32 = dtype == Dtype::f32 && (hopper || coin());
  emulator::device = {hopper || coin() ? 90 : 80, int(hopper ? draw(1, 10) : draw(1, coin() ? 1 : 8)), false};
  const int64_t S = draw(1, coin() ? 20 : 450), R = draw(1, coin() ? 20 : 150);
  const int64_t N = draw(1, coin() ? 6 : S > 20 ? 20 : 40), E = draw(1, 3);
  const int64_t D = aligned ? draw(1, 12) * 8 : draw(1, N > 6 ? 30 : 100);
  Tensor delta(dtype, S, N, D, draw_layout(aligned)), grad(dtype, R, N, D, draw_layout(aligned));
  std::vector<int64_t> reach(R), segments(N, 0);
  for (auto& x : reach) x = draw(0, S);
  if (coin()) std::sort(reach.begin(), reach.end());
  if (segmented) for (auto& x : segments) x = draw(0, E - 1);
  for (int64_t u = *std::max_element(reach.begin(), reach.end()); u < S; ++u) delta.poison(u);

  const int64_t far = draw(0, 5), line = far == 0 ? kFar : R;
  const bool transposed = far > 1 && coin();
  const int64_t strides[3] = {far == 1 ? kFar : S * line, transposed ? 1 : line, transposed ? S : 1};
  const auto memory = allocate((E * strides[0] + S * strides[1] + R * strides[2]) * bytes_of(wide));
  const auto out = [&](int64_t e, int64_t u, int64_t v) { return e * strides[0] + u * strides[1] + v * strides[2]; };

  cuda::EdgeScores call{delta.view(), grad.view(), dtype, tf32, reach.data(), segmented ? segments.data() : nullptr,
                        memory.get(), {strides[0], strides[1], strides[2]}, 0};
  call.plan();
  Workspace workspace(call.workspace());
  ++seen[(tf32 ? "tf32 " : "") + std::string(call.tensor_memory ? "hopper" : "portable")];
  for (const auto& tile : call.schedule.tiles) {
    ++seen["tiles of " + std::to_string(tile.slabs) + " slabs"];
    seen["tiles with a lower half"] += tile.depth(0) < tile.slabs;
  }
  for (const auto& piece : call.schedule.pieces) {
    ++seen[piece.slot == cuda::kDirect ? "whole" : "cut"];
    const bool periods = piece.slot != cuda::kDirect && piece.all.each < piece.count;
    seen[call.tensor_memory ? "cut in periods by hopper" : "cut in periods"] += periods;
  }
  seen["workers with several pieces"] += call.schedule.workers() < int64_t(call.schedule.pieces.size());
  if (call.tensor_memory) seen["receivers out of order"] += !std::is_sorted(reach.begin(), reach.end());

  // First what is added up ...
  std::vector<double> expected(E * S * R), allowed(E * S * R);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t u = 0; u < S; ++u)
      for (int64_t v = 0; v < R; ++v) {
        const double start = u < reach[v] ? double(float(normal())) : NAN;
        write(wide, memory.get(), out(e, u, v), start);
        expected[(e * S + u) * R + v] = start, allowed[(e * S + u) * R + v] = std::abs(start);
      }
  auto a = delta.values(), b = grad.values();
  if (tf32)
    for (auto* values : {&a, &b})
      for (double& x : *values) x = to_tf32(x);
  for (int64_t u = 0; u < S; ++u)
    for (int64_t v = 0; v < R; ++v)
      for (int64_t n = 0; u < reach[v] && n < N; ++n)
        for (int64_t d = 0, i = (segments[n] * S + u) * R + v; d < D; ++d) {
          const double product = a[(u * N + n) * D + d] * b[(v * N + n) * D + d];
          expected[i] += product, allowed[i] += std::abs(product);
        }
  call.run(workspace.memory.get(), nullptr);
  // The last array before the partial tiles: whoever goes in step has counted each of its periods.
  const auto& counters = call.schedule.counters;
  const auto* counted = static_cast<const char*>(workspace.memory.get()) + call.header.size() -
                        (counters.size() * sizeof(counters[0]) + 255) / 256 * 256;
  for (const auto& piece : call.schedule.pieces)
    for (int32_t period = 0; call.tensor_memory && piece.pace.workers > 0 && period < piece.pace.periods; ++period) {
      ++seen["in step"];
      check(reinterpret_cast<const int32_t*>(counted)[piece.pace.first + period] == piece.pace.workers,
            "a period is not counted once by each worker");
    }
  for (int64_t e = 0; e < E; ++e)
    for (int64_t u = 0; u < S; ++u)
      for (int64_t v = 0; v < R; ++v) {
        const double got = read(wide, memory.get(), out(e, u, v));
        const int64_t i = (e * S + u) * R + v;
        if (u >= reach[v]) check(std::isnan(got), "an entry outside of the staircase was written");
        else check(std::abs(got - expected[i]) <= allowed[i] * double(N * D + 8) * roundoff(wide), "a wrong score");
      }

  // ... then how often. An addition, even of zero, makes a signalling NaN a quiet one.
  const uint64_t signal = wide == Dtype::f64 ? 0x7FF4000000000000 : 0x7FA00000;
  std::vector<int> additions(E * S * R);
  const auto reset = [&](bool count) {
    for (int64_t e = 0; e < E; ++e)
      for (int64_t u = 0; u < S; ++u)
        for (int64_t v = 0; v < R; ++v) {
          char* const at = static_cast<char*>(memory.get()) + out(e, u, v) * bytes_of(wide);
          additions[(e * S + u) * R + v] += count && memcmp(at, &signal, size_t(bytes_of(wide))) != 0;
          memcpy(at, &signal, size_t(bytes_of(wide)));
        }
  };
  reset(false);
  emulator::after_block = [&] { reset(true); };
  call.run(workspace.memory.get(), nullptr);
  emulator::after_block = nullptr;
  for (int64_t e = 0; e < E; ++e) {
    const bool any = std::find(segments.begin(), segments.end(), e) != segments.end();
    for (int64_t u = 0; u < S; ++u)
      for (int64_t v = 0; v < R; ++v)
        check(additions[(e * S + u) * R + v] == (any && u < reach[v]), "blocks race for an entry, or none adds to it");
  }

  if (call.schedule.workers() == 0) return;
  emulator::device.capturing = true;
  try {
    call.run(workspace.memory.get(), nullptr);
    check(false, "a captured stream was not refused");
  } catch (const std::runtime_error&) {
  }
}

void masked_read() {
  const Dtype dtype = Dtype(draw(0, 3)), wide = accumulation(dtype);
  const auto mask_dtype = MaskDtype(draw(0, 4));
  const bool boolean = mask_dtype == MaskDtype::boolean, aligned = coin();
  emulator::device = {80, int(draw(1, 5)), false};
  const int64_t S = draw(0, 150), R = draw(1, 200), N = draw(1, 4), D = aligned ? draw(1, 8) * 8 : draw(1, 60);
  Tensor delta(dtype, S, N, D, draw_layout(aligned)), base(dtype, R, N, D, draw_layout(aligned));
  if (draw(0, 2) == 0) base.stride[0] = 0;

  const double density = coin() ? 0.05 : 0.6;
  const bool far = draw(0, 3) == 0, transposed = coin();
  const int64_t line = far ? kFar : transposed ? S : R, stride[2] = {transposed ? 1 : line, transposed ? line : 1};
  const auto memory = allocate((S * stride[0] + R * stride[1] + 1) * 8);
  std::vector<double> mask(S * R);
  for (int64_t u = 0; u < S; ++u) {
    const bool unused = draw(0, 3) == 0;
    if (unused) delta.poison(u);
    for (int64_t v = 0; v < R; ++v) {
      const bool keep = !unused && double(draw(0, 999)) < density * 1000;
      const int64_t i = u * stride[0] + v * stride[1];
      if (boolean) static_cast<uint8_t*>(memory.get())[i] = keep;
      else write(Dtype(int(mask_dtype)), memory.get(), i, keep ? normal() : 0.0);
      const double weight = boolean ? double(keep) : read(Dtype(int(mask_dtype)), memory.get(), i);
      mask[u * R + v] = wide == Dtype::f64 ? weight : double(float(weight));
    }
  }
  ++seen[aligned ? "pieces of 16 bytes" : "any layout"];

  const auto out = allocate(R * N * D * bytes_of(dtype));
  memset(out.get(), 0xFF, size_t(R * N * D * bytes_of(dtype)));
  const cuda::MaskedRead call{delta.view(), base.view(), dtype, memory.get(), mask_dtype, {stride[0], stride[1]},
                              out.get(), 0};
  Workspace workspace(call.workspace());
  call.run(workspace.memory.get(), nullptr);

  const auto a = delta.values(), b = base.values();
  for (int64_t v = 0; v < R; ++v)
    for (int64_t x = 0; x < N * D; ++x) {
      double sum = b[v * N * D + x], size = std::abs(sum);
      for (int64_t u = 0; u < S; ++u)
        if (const double weight = mask[u * R + v]; weight != 0)
          sum += weight * a[u * N * D + x], size += std::abs(weight * a[u * N * D + x]);
      const double got = read(dtype, out.get(), v * N * D + x);
      const double allowed = size * double(S + 4) * roundoff(wide) + std::abs(sum) * 2 * roundoff(dtype) + 0x1p-24;
      check(std::abs(got - sum) <= allowed, "a wrong value");
    }
}

}  // namespace

int main(int, char** arguments) {
  const bool of_scores = std::string(arguments[1]) == "scores";
  for (int seed = atoi(arguments[2]); seed < atoi(arguments[3]); ++seed) {
    about = std::string(arguments[1]) + " " + std::to_string(seed);
    numbers.seed(unsigned(seed));
    of_scores ? scores() : masked_read();
  }
  const char* separator = "{";
  for (const auto& [what, count] : seen) printf("%s\"%s\": %d", separator, what.c_str(), count), separator = ", ";
  printf("}\n");
}
