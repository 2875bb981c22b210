// Where things lie in shared memory and registers: index arithmetic only, also for the host, where it can be checked.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define EAP_BOTH __host__ __device__ __forceinline__
#else
#define EAP_BOTH inline
#endif

namespace eap::cuda {

// The portable kernel keeps rows of 64 bytes, four pieces of 16. Two rows fill the 128 bytes of all banks, so the piece
// is exchanged by bits 1-2 of the row: eight consecutive rows then read the same piece from eight different places.
EAP_BOTH constexpr uint32_t row64(int row, int piece) { return row * 64 + ((piece ^ (row >> 1 & 3)) << 4); }

// ldmatrix.x4 reads four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8. For the
// A operand of mma.m16n8 they are (rows 0-7, piece 0), (8-15, 0), (0-7, 1), (8-15, 1): k is 16 for 16-bit values
// and 8 for 32-bit ones. Lane l receives 32-bit word l % 4 of row l / 4, as both kinds expect.
EAP_BOTH constexpr int a_row(int lane) { return lane & 15; }
EAP_BOTH constexpr int a_piece(int lane) { return lane >> 4; }
// For B, kept as [n][k], of two neighbouring blocks of 8 columns: (n 0-7, piece 0), (0-7, 1), (8-15, 0), (8-15, 1).
EAP_BOTH constexpr int b_row(int lane) { return (lane & 7) + (lane >> 4 << 3); }
EAP_BOTH constexpr int b_piece(int lane) { return lane >> 3 & 1; }

// Register i of a lane's accumulators, of mma.m16n8 (i < 4) and, within its 16 rows of a warp, of wgmma.m64nN alike:
// pairs of columns, then rows 8 apart, then the next 8 columns.
EAP_BOTH constexpr int c_row(int lane, int i) { return (lane >> 2) + (i >> 1 & 1) * 8; }
EAP_BOTH constexpr int c_column(int lane, int i) { return (lane & 3) * 2 + (i & 1) + (i >> 2) * 8; }

// Shared memory descriptor of wgmma for rows of 128 bytes along k, 128-byte swizzle, as TMA writes them: bits 0-13
// address / 16; 16-29 leading offset, not used by swizzled k-major operands; 32-45 stride offset / 16, from eight rows
// to the next eight: 1024 bytes; 62-63 swizzle mode, 1 = 128 bytes. Slabs start at multiples of 1024.
EAP_BOTH constexpr uint64_t descriptor(uint32_t address) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The next instruction's k is 32 bytes further on; the swizzle acts on the address that results.
constexpr uint64_t kDescriptorStep = 32 >> 4;

}  // namespace eap::cuda
