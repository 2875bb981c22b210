// Fibers, shared memory, what runs in the background, and the part of the CUDA runtime that the launchers call.
#include "emulator.h"
#undef cudaLaunchKernelEx

#include <ucontext.h>

#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

emulator::Index threadIdx, blockIdx, gridDim;

namespace emulator {

Device device{80, 4, false};
std::function<void()> after_block;

void fail(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  exit(1);
}

namespace {

struct Copy { uint32_t to; const void* from; int bytes; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[64 << 10]};
  unsigned block, id;  // of the cluster's blocks; of the block's threads
  bool done = false;
  std::function<bool()> ready;
  std::vector<Copy> copies;  // not yet committed
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<Wgmma> products;
  std::deque<std::vector<Wgmma>> product_groups;
};

struct Meeting { std::vector<void*> brought; unsigned arrived = 0; int64_t round = 0; };
struct Barrier { uint32_t arrivals, pending; int64_t bytes = 0, phase = 0; };
struct Load { unsigned block; uint32_t to; CUtensorMap map; int x, y, z; uint32_t barrier; };
// How the encoder below keeps a tensor map.
struct Map { const char* data; uint64_t size[3], stride[2]; uint32_t box[3], bytes; };

std::mt19937 random_numbers(1);
// What the threads of a block share.
struct Block {
  std::vector<char> memory;
  std::vector<Meeting> warps;
  Meeting all;
  std::map<uint32_t, Barrier> barriers;
  unsigned left;  // threads that have not ended
};
std::vector<Block> blocks;  // of the cluster that runs
Meeting cluster;
unsigned at;  // the block whose shared memory is meant
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Load> loads;
ucontext_t scheduler;
Fiber* now;
const std::function<void()>* body;

void begin_fiber() {
  (*body)();
  now->done = true;
  swapcontext(&now->context, &scheduler);
}

Barrier& barrier_at(uint32_t address) {
  require(blocks[at].left > 0, "a block of the cluster has ended");
  const auto found = blocks[at].barriers.find(address);
  require(found != blocks[at].barriers.end(), "no barrier there");
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

// The 128-byte swizzle: address bits 4-6 are exchanged by bits 7-9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void finish_load(const Load& load) {
  Map map;
  memcpy(&map, &load.map, sizeof map);
  at = load.block;
  for (uint32_t row = 0; row < map.box[2]; ++row)
    for (uint32_t i = 0; i < map.box[0]; ++i) {
      const uint64_t x = load.x + i, y = load.y, z = load.z + row;
      uint32_t value = 0;
      if (x < map.size[0] && y < map.size[1] && z < map.size[2])
        memcpy(&value, map.data + x * map.bytes + y * map.stride[0] + z * map.stride[1], map.bytes);
      if (map.bytes == 4) value = rounded_to_tf32(value);
      memcpy(shared(swizzled(load.to + row * 128 + i * map.bytes), map.bytes), &value, map.bytes);
    }
  Barrier& barrier = barrier_at(load.barrier);
  barrier.bytes -= int64_t(map.box[0]) * map.box[1] * map.box[2] * map.bytes;
  end_phase_if_complete(barrier);
}

// A row of an operand, 32 bytes in two swizzled pieces, as its descriptor says.
struct Row {
  float x[16];
  Row(uint64_t descriptor, int row, const Wgmma& product) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, eight_rows = (descriptor >> 32 & 0x3FFF) << 4;
    require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "not the descriptor of a 128-byte swizzle");
    for (int piece = 0; piece < 2; ++piece) {
      uint32_t bits[4];
      memcpy(bits, shared(swizzled(start + row / 8 * eight_rows + row % 8 * 128 + piece * 16), 16), 16);
      const int packed = 4 / product.bytes;
      for (int k = 0; k < 4 * packed; ++k)
        x[piece * 4 * packed + k] = product.value(bits[k / packed], k % packed);
    }
  }
};

void finish_product(const Wgmma& p) {
  const int row = int(now->id) % 128 / 32 * 16 + int(now->id) % 32 / 4, pair = int(now->id) % 4 * 2;
  const Row a[2] = {{p.a, row, p}, {p.a, row + 8, p}};
  for (int j = 0; j < p.columns / 4; ++j) {
    const Row b(p.b, j / 2 * 8 + pair + j % 2, p);
    for (int half = 0; half < 2; ++half) {
      float& c = p.c[j / 2 * 4 + half * 2 + j % 2];
      for (int k = 0; k < 32 / p.bytes; ++k) c += a[half].x[k] * b.x[k];
    }
  }
}

void run_cluster(unsigned size, unsigned threads, size_t shared_bytes) {
  const std::vector<char> memory(shared_bytes, char(0xFF));
  blocks.assign(size, {memory, std::vector<Meeting>(threads / 32), {}, {}, threads});
  cluster = {};
  fibers.clear();
  for (unsigned i = 0; i < size * threads; ++i) {
    Fiber& fiber = *fibers.emplace_back(new Fiber);
    fiber.block = i / threads;
    fiber.id = i % threads;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 64 << 10;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, begin_fiber, 0);
  }
  const unsigned first_block = blockIdx.x;
  std::vector<Fiber*> order;
  for (auto& fiber : fibers) order.push_back(fiber.get());
  std::shuffle(order.begin(), order.end(), random_numbers);
  // For a while one warp runs alone, as far as it can, and then another, or all: so they get far ahead of each other.
  const unsigned all = size * threads / 32;
  unsigned alone = all;
  for (unsigned left = size * threads; left > 0;) {
    if (random_numbers() % 8 == 0) alone = unsigned(random_numbers() % (all + 1));
    bool progress = false;
    for (Fiber* fiber : order) {
      if (alone != all && (fiber->block * threads + fiber->id) / 32 != alone) continue;
      if (fiber->done || (fiber->ready && !fiber->ready())) continue;
      progress = true;
      fiber->ready = nullptr;
      now = fiber;
      threadIdx = {fiber->id, 0, 0};
      at = fiber->block;
      blockIdx.x = first_block + at;
      swapcontext(&scheduler, &fiber->context);
      left -= fiber->done;
      blocks[fiber->block].left -= fiber->done;
    }
    if (!loads.empty() && (random_numbers() % 3 == 0 || !progress)) {
      const size_t i = random_numbers() % loads.size();
      finish_load(loads[i]);
      loads.erase(loads.begin() + int64_t(i));
      progress = true;
    }
    require(progress || alone != all, "threads wait for each other");
    if (!progress) alone = all;
  }
  require(loads.empty(), "loads in flight when the blocks end");
  for (auto& fiber : fibers)
    require(fiber->product_groups.empty() && fiber->products.empty(), "products in flight when the block ends");
}

}  // namespace

char* shared(uint32_t address, size_t bytes) {
  Block& block = blocks[at];
  require(block.left > 0, "a block of the cluster has ended");
  require(address >= kBase && address + bytes <= kBase + block.memory.size(), "outside of the shared memory asked for");
  const auto next = block.barriers.lower_bound(address - 7);
  require(next == block.barriers.end() || next->first >= address + bytes, "a barrier is overwritten");
  return block.memory.data() + (address - kBase);
}

void wait_until(std::function<bool()> ready) {
  now->ready = std::move(ready);
  Fiber* const self = now;
  swapcontext(&self->context, &scheduler);
}

void meet(Group group, void* mine, const std::function<void(void**)>& together) {
  const unsigned all = unsigned(fibers.size()), threads = all / unsigned(blocks.size());
  const unsigned size = group == kWarp ? 32 : group == kBlock ? threads : all;
  Block& block = blocks[now->block];
  Meeting& meeting = group == kWarp ? block.warps[now->id / 32] : group == kBlock ? block.all : cluster;
  meeting.brought.resize(size);
  meeting.brought[(now->block * threads + now->id) % size] = mine;
  const int64_t round = meeting.round;
  if (++meeting.arrived < size) return wait_until([&meeting, round] { return meeting.round != round; });
  meeting.arrived = 0;
  together(meeting.brought.data());
  ++meeting.round;
}

void copy_async(uint32_t to, const void* from, int bytes) {
  require(0 <= bytes && bytes <= 16 && to % 16 == 0 && uintptr_t(from) % 16 == 0, "cp.async of a wrong size or place");
  now->copies.push_back({to, from, bytes});
}
void commit_copies() { now->copy_groups.push_back(std::exchange(now->copies, {})); }
void wait_copies(int pending) {
  for (; int(now->copy_groups.size()) > pending; now->copy_groups.pop_front())
    for (const Copy& copy : now->copy_groups.front()) {
      char* const to = shared(copy.to, 16);
      memset(to, 0, 16);
      memcpy(to, copy.from, size_t(copy.bytes));
    }
}

void barrier_init(uint32_t address, uint32_t arrivals) {
  require(address % 8 == 0, "a barrier is not aligned");
  shared(address, 8);
  blocks[at].barriers[address] = {arrivals, arrivals};
}
void barrier_arrive(uint32_t address, uint32_t expected_bytes) {
  Barrier& barrier = barrier_at(address);
  require(barrier.pending > 0, "more arrivals at a barrier than it has");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  end_phase_if_complete(barrier);
}
void barrier_arrive_in(unsigned block, uint32_t address) {
  require(block < blocks.size(), "no such block in the cluster");
  at = block;
  barrier_arrive(address, 0);
  at = now->block;
}
void barrier_wait(uint32_t address, uint32_t parity) {
  const Barrier& barrier = barrier_at(address);
  const auto over = [&barrier, parity] { return (barrier.phase & 1) != parity; };
  if (!over() || random_numbers() % 4 == 0) wait_until(over);
}
void tma_load(uint32_t to, const CUtensorMap* map, int x, int y, int z, uint32_t barrier, uint32_t in_blocks) {
  require(to % 1024 == 0, "a swizzled tile is not aligned");
  if (in_blocks == 0) in_blocks = 1u << now->block;
  require(in_blocks >> blocks.size() == 0, "no such block in the cluster");
  for (unsigned block = 0; block < blocks.size(); ++block)
    if (in_blocks >> block & 1) loads.push_back({block, to, *map, x, y, z, barrier});
}

void wgmma(const Wgmma& product) { now->products.push_back(product); }
void commit_wgmma() { now->product_groups.push_back(std::exchange(now->products, {})); }
void wait_wgmma(int pending) {
  if (random_numbers() % 3 == 0) wait_until([] { return true; });
  for (; int(now->product_groups.size()) > pending; now->product_groups.pop_front())
    for (const Wgmma& product : now->product_groups.front()) finish_product(product);
}

void run(dim3 grid, unsigned cluster_size, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  require(cluster_size == 1 || device.capability >= 90, "clusters need compute capability 9.0");
  require(grid.x > 0 && grid.x % cluster_size == 0 && grid.y > 0 && grid.y < 65536, "a grid of a wrong size");
  // What a block may have on every card of the kind: 8.6 and 8.9 have least of 8.x.
  require(shared_bytes <= size_t(device.capability == 90 ? 227 : 99) << 10, "more shared memory than a block may have");
  body = &kernel;
  gridDim = {grid.x, grid.y, 1};
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      blockIdx = {x, y, 0};
      run_cluster(cluster_size, unsigned(threads), shared_bytes);
      if (after_block) after_block();
    }
}

// Fails where the documentation of cuTensorMapEncodeTiled says that it does.
static CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* size,
                       const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const bool half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const uint32_t bytes = half ? 2 : 4;
  bool good = (half || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32) && rank == 3 && uintptr_t(map) % 64 == 0 &&
              uintptr_t(data) % 16 == 0 && box[0] * bytes <= 128 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (int i = 0; i < 2; ++i) good = good && stride[i] > 0 && stride[i] % 16 == 0 && stride[i] >> 40 == 0;
  for (int i = 0; i < 3; ++i)
    good = good && size[i] > 0 && size[i] >> 32 == 0 && box[i] > 0 && box[i] <= 256 && step[i] == 1;
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  const Map kept{static_cast<const char*>(data), {size[0], size[1], size[2]}, {stride[0], stride[1]},
                 {box[0], box[1], box[2]}, bytes};
  static_assert(sizeof kept <= sizeof *map);
  memcpy(map, &kept, sizeof kept);
  return CUDA_SUCCESS;
}

}  // namespace emulator

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = emulator::device.capability;
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : emulator::device.processors;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::device.capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&emulator::encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
