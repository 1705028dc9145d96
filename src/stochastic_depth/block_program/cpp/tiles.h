// Tile registers (AMX): products of matrices of bfloat16, summed in float32.
//
// A tile has up to 16 rows of 64 bytes. Registers 0 to 3 hold sums, [16][16]; A is [16][K] and B is
// [K/2][16][2], so that a row of B has the pairs of two rows of a matrix. K is 32 or 16. On processors
// without the instructions, TILES emulates them, for tests.

#pragma once

#include "vectors.h"

#ifdef TILES

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

template <int K>
constexpr int A = K == 32 ? 4 : 5;
template <int K>
constexpr int B = K == 32 ? 6 : 7;

// The number of rows, and of bytes in a row, of each register.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 32, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

#ifdef __AMX_BF16__

// Linux lets a process use the registers only after it has asked for permission.
inline bool tiles_permitted() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Configures the tiles of the calling thread, and releases them at the end of the scope.
class Tiles {
 public:
  Tiles() {
    const TileShapes shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

template <int To>
void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(To));
}

// Rows of the tile are `stride` elements apart in memory.
template <int To, class T>
void load_tile(const T* p, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride * sizeof(T)), "i"(To) : "memory");
}

template <int From>
void store_tile(float* p, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride * sizeof(float)), "i"(From)
               : "memory");
}

// Sum += A * B.
template <int K, int Sum>
void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(A<K>), "i"(B<K>));
}

#else

inline bool tiles_permitted() { return true; }

inline thread_local uint8_t tile[8][16][64];
constexpr TileShapes SHAPES;

class Tiles {
 public:
  Tiles() { memset(tile, 0, sizeof tile); }
};

template <int To>
void zero_tile() {
  memset(tile[To], 0, sizeof tile[To]);
}

template <int To, class T>
void load_tile(const T* p, size_t stride) {
  for (int row = 0; row < SHAPES.rows[To]; row++)
    memcpy(tile[To][row], p + row * stride, SHAPES.bytes[To]);
}

template <int From>
void store_tile(float* p, size_t stride) {
  for (int row = 0; row < 16; row++) memcpy(p + row * stride, tile[From][row], 64);
}

template <int K, int Sum>
void multiply_tiles() {
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K / 2; k++) {
      const Operand a = broadcast((const factor*)&tile[A<K>][row][4 * k]);
      const Operand b = get<Operand>((const factor*)tile[B<K>][k]);
      float* sum = (float*)tile[Sum][row];
      put(sum, multiply_add(get<Floats>(sum), a, b));
    }
}

#endif
#endif
