// SPDX-License-Identifier: Apache-2.0
// Tiles: C[16 of r, 16 of d] += A[16 of r, 32 of n] B[32 of n, 16 of d]; A is h^T, packed once, and B is `a` with pairs
// of rows interleaved, packed here for 32 columns at a time.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/outer.h"

namespace osora::cpu {
namespace {

constexpr int64_t kTile = 16, kStep = 32;        // entries of r and d, of n
constexpr int64_t kTileEntries = kTile * kStep;  // of A and of B, bfloat16
constexpr int64_t kAhead = 24;                   // rows of `a` that are asked for in advance
constexpr int64_t kRows = 2048;                  // of `a` packed at a time: 128 KiB of the second-level cache

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct alignas(64) TileConfig {
  uint8_t palette = 0, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes. Leaves the registers' shape as it was: other libraries keep track of theirs.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    TileConfig config;
    config.palette = 1;
    std::fill_n(config.row_bytes, 8, uint16_t{64});
    std::fill_n(config.rows, 8, uint8_t{16});
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};

// Rows of a [n, 32 columns of it] -> B tiles [n / 32, 2, 16 pairs, 16 columns, 2]. Within the two tiles columns are in
// the order that interleaving by lanes leaves: tile_column() tells it.
void pack_columns(const uint16_t* a, int64_t n, int64_t lda, int64_t columns, uint16_t* tiles) {
  const __mmask32 mask = columns >= 32 ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (int64_t i = 0; i < n; i += 2, a += 2 * lda) {
    // Rows lie too far apart for the processor to see that they are read in turn.
    if (i + kAhead + 1 < n) {
      _mm_prefetch(reinterpret_cast<const char*>(a + kAhead * lda), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(a + (kAhead + 1) * lda), _MM_HINT_T0);
    }
    const __m512i even = _mm512_maskz_loadu_epi16(mask, a);
    const __m512i odd = i + 1 < n ? _mm512_maskz_loadu_epi16(mask, a + lda) : _mm512_setzero_si512();
    uint16_t* const out = tiles + i / kStep * (2 * kTileEntries) + i % kStep / 2 * kStep;
    _mm512_store_si512(out, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(out + kTileEntries, _mm512_unpackhi_epi16(even, odd));
  }
  const int64_t pairs = (n + 1) / 2, all = blocks(n, kStep) * kStep / 2;
  for (int64_t pair = pairs; pair < all; ++pair) {
    uint16_t* const out = tiles + 2 * pair / kStep * (2 * kTileEntries) + 2 * pair % kStep / 2 * kStep;
    _mm512_store_si512(out, _mm512_setzero_si512());
    _mm512_store_si512(out + kTileEntries, _mm512_setzero_si512());
  }
}

// The column of `a`, of 32, that lies at place `at` of tile 0 or 1.
constexpr int64_t tile_column(int64_t tile, int64_t at) { return at / 4 * 8 + at % 4 + 4 * tile; }

// 16 x 16 numbers, rows of `from` 16 apart -> columns[16], each a row of the transpose.
inline __attribute__((always_inline)) void transpose(const float* from, __m512 (&columns)[16]) {
  __m512 pairs[16], quads[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512 upper = _mm512_load_ps(from + i * kTile), lower = _mm512_load_ps(from + (i + 1) * kTile);
    pairs[i] = _mm512_unpacklo_ps(upper, lower);
    pairs[i + 1] = _mm512_unpackhi_ps(upper, lower);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int e = 0; e < 2; ++e) {
      const __m512d upper = _mm512_castps_pd(pairs[i + e]), lower = _mm512_castps_pd(pairs[i + 2 + e]);
      quads[i + 2 * e] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
      quads[i + 2 * e + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
    }
  }
  // quads[4 g + e]: of each 128-bit lane l the column 4 l + e, rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int e = 0; e < 4; ++e) {
    const __m512 low0 = _mm512_shuffle_f32x4(quads[e], quads[4 + e], 0x88);
    const __m512 low1 = _mm512_shuffle_f32x4(quads[8 + e], quads[12 + e], 0x88);
    const __m512 high0 = _mm512_shuffle_f32x4(quads[e], quads[4 + e], 0xdd);
    const __m512 high1 = _mm512_shuffle_f32x4(quads[8 + e], quads[12 + e], 0xdd);
    columns[e] = _mm512_shuffle_f32x4(low0, low1, 0x88);
    columns[8 + e] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
    columns[4 + e] = _mm512_shuffle_f32x4(high0, high1, 0x88);
    columns[12 + e] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
  }
}

// sums: tiles [2 halves of r][2 tiles of d], of 16 x 16 -> rows of p, up to `rank` numbers each, for `columns` columns
// of a. `add`: to what is there.
void store(const float* sums, int64_t rank, int64_t columns, bool add, int64_t ldp, float* p) {
  for (int64_t half = 0; half < 2 && half * kTile < rank; ++half) {
    const int64_t count = std::min(kTile, rank - half * kTile);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    for (int64_t tile = 0; tile < 2; ++tile) {
      __m512 rows[16];
      transpose(sums + (2 * half + tile) * kTile * kTile, rows);
      for (int64_t at = 0; at < kTile; ++at) {
        const int64_t column = tile_column(tile, at);
        if (column >= columns) continue;
        float* const out = p + column * ldp + half * kTile;
        const __m512 before = add ? _mm512_maskz_loadu_ps(mask, out) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(before, rows[at]));
      }
    }
  }
}

}  // namespace

int64_t outer_packed_size(int64_t n, int64_t r) { return blocks(n, kStep) * kStep * blocks(r, 2 * kTile) * 2 * kTile; }

int64_t outer_scratch_size() { return kRows * kOuterColumns; }

// A tiles [r / 32, n / 32, 2, 16 of r, 32 of n], zero beyond the ends.
void outer_pack(const uint16_t* h, int64_t n, int64_t r, int64_t ldh, uint16_t* packed) {
  const int64_t steps = blocks(n, kStep);
  std::memset(packed, 0, sizeof(uint16_t) * static_cast<size_t>(outer_packed_size(n, r)));
  for (int64_t i = 0; i < n; ++i, h += ldh) {
    for (int64_t half = 0; half * kTile < r; ++half) {
      const int64_t tile = (half / 2 * steps + i / kStep) * 2 + half % 2, count = std::min(kTile, r - half * kTile);
      uint16_t* const out = packed + tile * kTileEntries + i % kStep;
      for (int64_t j = 0; j < count; ++j) out[j * kStep] = h[half * kTile + j];
    }
  }
}

void outer_amx(const uint16_t* a, int64_t n, int64_t lda, const uint16_t* packed, int64_t r, int64_t begin, int64_t end,
               uint16_t* scratch, float* p) {
  const Tiles shape;
  const int64_t steps = blocks(n, kStep), groups = blocks(r, 2 * kTile);
  alignas(64) float sums[4 * kTile * kTile];
  for (int64_t column = begin; column < end; column += kOuterColumns) {
    const int64_t columns = std::min(kOuterColumns, end - column);
    for (int64_t row = 0; row == 0 || row < n; row += kRows) {
      const int64_t rows = std::min(kRows, n - row), first = row / kStep, count = blocks(rows, kStep);
      pack_columns(a + row * lda + column, rows, lda, columns, scratch);
      for (int64_t group = 0; group < groups; ++group) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const uint16_t* left = packed + (group * steps + first) * 2 * kTileEntries;
        const uint16_t* right = scratch;
        for (int64_t step = 0; step < count; ++step, left += 2 * kTileEntries, right += 2 * kTileEntries) {
          _tile_loadd(4, left, 64);
          _tile_loadd(5, left + kTileEntries, 64);
          _tile_loadd(6, right, 64);
          _tile_loadd(7, right + kTileEntries, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + kTile * kTile, 64);
        _tile_stored(2, sums + 2 * kTile * kTile, 64);
        _tile_stored(3, sums + 3 * kTile * kTile, 64);
        store(sums, r - group * 2 * kTile, columns, row > 0, r, p + column * r + group * 2 * kTile);
      }
    }
  }
}

}  // namespace osora::cpu
