// Integer kernels for one token, part of kernels_quantised.hpp: four products per instruction and lane (AVX-512 VNNI).
//
// The factor of the rows is rounded to 16 bits with a scale per block, and multiplied in two parts of 8 bits. This is
// 256 times finer than rounding to 8 bits, as in dense int8 arithmetic, but needs twice as many multiplications.
#pragma once

constexpr size_t kIntegerBlock = 32, kMostIntegers = 1 << 14;

// The largest n = 256 * high + low with signed bytes high and low. The bytes of n + 128 are high and low + 128.
constexpr int kLargest = 127 * 256 + 127;

inline __m512i shifted_integers(__m512 x) {
  return _mm512_add_epi32(_mm512_maskz_cvtps_epi32(0xffff, x), _mm512_set1_epi32(128));
}

inline __m512i joined(__m512i high, __m512i low) {
  return _mm512_add_epi32(low, _mm512_maskz_slli_epi32(0xffff, high, 8));
}

inline bool in_integers(const Rows& rows, size_t tokens) {
  return tokens == 1 && !rows.exact && !rows.short_scales && rows.block == kIntegerBlock && rows.width <= kMostIntegers;
}

// Elements of a step, which is 64 bytes of a row: 64 at 8 bits; 128 at 4 bits, with even ones in the lower halves.
template <class Q>
constexpr size_t kElements = 512 / Q::bits;

// The input of a step, in the order of the bytes of a row.
template <class Q>
struct alignas(64) IntegerStep {
  static constexpr size_t parts = 8 / Q::bits;  // at 4 bits, even and odd elements are separate
  int8_t high[parts][64], low[parts][64];
  int32_t start[16];  // minus the middle of the integers times the input
  float scale[16];
};

template <class Q>
inline size_t integer_steps(size_t width) {
  return (width + kElements<Q> - 1) / kElements<Q>;
}

template <class Q>
inline const float* round_input(const float* x, size_t width, float* room) {
  static_assert(sizeof(IntegerStep<Q>) <= kElements<Q> * sizeof(float) && 128 % kElements<Q> == 0, "it fits into room");
  IntegerStep<Q>* steps = reinterpret_cast<IntegerStep<Q>*>(room);
  constexpr size_t parts = IntegerStep<Q>::parts, lanes = 16 * kIntegerBlock / kElements<Q>;
  const size_t count = integer_steps<Q>(width);
  if (width % kElements<Q> != 0) memset(steps + count - 1, 0, sizeof *steps);
  for (size_t first = 0; first < width; first += kIntegerBlock) {
    IntegerStep<Q>& step = steps[first / kElements<Q>];
    const size_t block = first % kElements<Q> / kIntegerBlock;
    V in[2];
    Q::split(x + first, in);
    const __m512 largest = _mm512_max_ps(_mm512_abs_ps((__m512)in[0]), _mm512_abs_ps((__m512)in[1]));
    const bool ordered = _mm512_cmp_ps_mask((__m512)in[0], (__m512)in[1], _CMP_UNORD_Q) == 0;
    const float most = ordered ? _mm512_reduce_max_ps(largest) : NAN;  // rounding would turn a NaN into a number
    const float inverse = most > 1e-30f ? kLargest / most : 0;
    for (size_t j = 0; j < 2; ++j) {
      const __m512i shifted = shifted_integers((__m512)(in[j] * inverse));
      const __m512i high = _mm512_maskz_srai_epi32(0xffff, shifted, 8);
      const __m512i low = _mm512_xor_si512(shifted, _mm512_set1_epi32(128));
      const size_t part = parts == 1 ? 0 : j, at = parts == 1 ? block * 32 + j * 16 : block * 16;
      _mm_store_si128(reinterpret_cast<__m128i*>(step.high[part] + at), _mm512_maskz_cvtepi32_epi8(0xffff, high));
      _mm_store_si128(reinterpret_cast<__m128i*>(step.low[part] + at), _mm512_maskz_cvtepi32_epi8(0xffff, low));
    }
    for (size_t l = 0; l < lanes; ++l) step.scale[block * lanes + l] = most / kLargest;
  }
  const __m512i ones = _mm512_set1_epi8(1), middle = _mm512_set1_epi32(-(1 << (Q::bits - 1)));
  for (size_t s = 0; s < count; ++s) {
    __m512i high = _mm512_setzero_si512(), low = high;
    for (size_t p = 0; p < parts; ++p) {
      high = _mm512_dpbusd_epi32(high, ones, _mm512_load_si512(steps[s].high[p]));
      low = _mm512_dpbusd_epi32(low, ones, _mm512_load_si512(steps[s].low[p]));
    }
    _mm512_store_si512(steps[s].start, _mm512_mullo_epi32(joined(high, low), middle));
  }
  return room;
}

template <class Q>
inline __m512i load_step(const QuantisedRow& row, size_t s, size_t width) {
  const size_t left = width * Q::bits / 8 - s * 64;
  return _mm512_maskz_loadu_epi8(left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1, row.data + s * 64);
}

// The even or the odd elements at four bits, all elements at eight.
template <class Q>
inline __m512i part_of(__m512i bytes, size_t part) {
  if (Q::bits == 8) return bytes;
  return _mm512_and_si512(part == 0 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
}

// Prefetches for eight rows at a step: the same step of the next rows and, at the first step, all of their scales.
__attribute__((always_inline)) inline void fetch_step(const QuantisedRow* next, size_t s, size_t blocks) {
  if (next == nullptr) return;
  for (size_t r = 0; r < kBlock; ++r) {
    fetch_bytes(next[r].data + s * 64, 64);
    if (s == 0) fetch_bytes(next[r].scales, blocks * sizeof(float));
  }
}

// For each of sixteen lanes, the number of its block in a step, if every block has `lanes` lanes.
inline __m512i block_of_lane(size_t lanes) {
  int32_t blocks[16];
  for (size_t l = 0; l < 16; ++l) blocks[l] = static_cast<int32_t>(l / lanes);
  return _mm512_loadu_si512(blocks);
}

template <class Q>
inline void project_integer_tile(const QuantisedRow* rows, const QuantisedRow* next, size_t count,
                                 const IntegerStep<Q>* steps, size_t width, float* out) {
  constexpr size_t blocks_each = kElements<Q> / kIntegerBlock;
  const size_t blocks = width / kIntegerBlock;
  const __m512i spread = block_of_lane(16 / blocks_each);
  __m512 acc[kBlock];
  for (size_t r = 0; r < kBlock; ++r) acc[r] = _mm512_setzero_ps();
  for (size_t s = 0; s < integer_steps<Q>(width); ++s) {
    fetch_step(next, s, blocks);
    const IntegerStep<Q>& step = steps[s];
    const size_t blocks_left = blocks - s * blocks_each;
    const __mmask16 scaled =
        static_cast<__mmask16>((1u << (blocks_left < blocks_each ? blocks_left : blocks_each)) - 1);
    const __m512i start = _mm512_load_si512(step.start);
    const __m512 scale = _mm512_load_ps(step.scale);
    for (size_t r = 0; r < kBlock; ++r) {
      const __m512i data = load_step<Q>(rows[r], s, width);
      __m512i high = _mm512_setzero_si512(), low = start;
      for (size_t p = 0; p < IntegerStep<Q>::parts; ++p) {
        const __m512i w = part_of<Q>(data, p);
        high = _mm512_dpbusd_epi32(high, w, _mm512_load_si512(step.high[p]));
        low = _mm512_dpbusd_epi32(low, w, _mm512_load_si512(step.low[p]));
      }
      const __m512i total = joined(high, low);
      const __m512 scales = _mm512_maskz_loadu_ps(scaled, rows[r].floats() + s * blocks_each);
      const __m512 product = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, total), scale);
      acc[r] = _mm512_fmadd_ps(product, _mm512_maskz_permutexvar_ps(0xffff, spread, scales), acc[r]);
    }
  }
  float totals[kBlock];  // sums all: a partly read array would not stay in registers
  for (size_t r = 0; r < kBlock; ++r) totals[r] = sum((V)acc[r]);
  memcpy(out, totals, count * sizeof(float));
}

template <class Q>
void project_integers(const Rows& rows, Picks picks, const float* input, float* out, Ahead ahead) {
  const IntegerStep<Q>* steps = reinterpret_cast<const IntegerStep<Q>*>(input);
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t count) {
    project_integer_tile<Q>(now, next, count, steps, rows.width, out + i);
  });
}

// The weights of eight rows, one block per lane: h times the scale of the block, rounded to 16 bits relative to the
// largest of the eight.
struct IntegerWeights {
  __m512i high[2], low[2];  // one byte for each of four rows
  __m512i start;            // minus the middle of the integers times the weights
  __m512 scale;
};

// In each lane, the upper sixteen bits of `upper` and the lower sixteen of `lower`.
inline __m512i upper_halves_of(__m512i upper, __m512i lower) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, lower, upper);
}

// In each lane, the second byte of a, the second of b, the first of a and the first of b.
inline __m512i split_bytes(__m512i a, __m512i b) {
  const __m512i both = upper_halves_of(_mm512_maskz_slli_epi32(0xffff, b, 16), a);
  const __m128i order = _mm_set_epi8(14, 12, 15, 13, 10, 8, 11, 9, 6, 4, 7, 5, 2, 0, 3, 1);
  return _mm512_shuffle_epi8(both, _mm512_maskz_broadcast_i32x4(0xffff, order));
}

template <class Q>
inline IntegerWeights round_weights(const QuantisedRow* rows, const float* h, size_t first, size_t blocks) {
  const size_t count = blocks - first;
  const __mmask16 there = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  __m512 exact[kBlock], most = _mm512_setzero_ps();
  __mmask16 unordered = 0;
  for (size_t r = 0; r < kBlock; ++r) {
    exact[r] = _mm512_mul_ps(_mm512_set1_ps(h[r]), _mm512_maskz_loadu_ps(there, rows[r].floats() + first));
    most = _mm512_maskz_max_ps(0xffff, most, _mm512_abs_ps(exact[r]));
    unordered |= _mm512_cmp_ps_mask(exact[r], exact[r], _CMP_UNORD_Q);
  }
  most = _mm512_mask_mov_ps(most, unordered, _mm512_set1_ps(NAN));  // rounding would turn a NaN into a number
  const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
  const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(kLargest), most);
  IntegerWeights weights;
  __m512i shifted[kBlock], sum = _mm512_set1_epi32(-128 * static_cast<int>(kBlock));
  for (size_t r = 0; r < kBlock; ++r) {
    shifted[r] = shifted_integers(_mm512_mul_ps(exact[r], inverse));
    sum = _mm512_add_epi32(sum, shifted[r]);
  }
  for (size_t g = 0; g < 2; ++g) {
    const __m512i front = split_bytes(shifted[4 * g], shifted[4 * g + 1]);
    const __m512i back = split_bytes(shifted[4 * g + 2], shifted[4 * g + 3]);
    weights.high[g] = upper_halves_of(_mm512_maskz_slli_epi32(0xffff, back, 16), front);
    const __m512i low = upper_halves_of(back, _mm512_maskz_srli_epi32(0xffff, front, 16));
    weights.low[g] = _mm512_xor_si512(low, _mm512_set1_epi8(-128));
  }
  weights.start = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-(1 << (Q::bits - 1))));
  weights.scale = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / kLargest));
  return weights;
}

// Interleaves bytes of four rows: those of one half of every 128-bit lane. In its lane L, out[j] has bytes
// 16 L + 8 half + 4 j to 16 L + 8 half + 4 j + 3 of every row.
template <bool half>
inline void interleave_half(const __m512i rows[4], __m512i out[2]) {
  const auto pair = [](__m512i a, __m512i b) { return half ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b); };
  const __m512i first = pair(rows[0], rows[1]), second = pair(rows[2], rows[3]);
  out[0] = _mm512_unpacklo_epi16(first, second);
  out[1] = _mm512_unpackhi_epi16(first, second);
}

// Interleaves the bytes of four rows: in its 128-bit lane L, out[j] has bytes 16 L + 4 j to 16 L + 4 j + 3 of every
// row.
inline void interleave(const __m512i rows[4], __m512i out[4]) {
  interleave_half<false>(rows, out);
  interleave_half<true>(rows, out + 2);
}

// Adds eight rows to `sums`: sixteen floats for each step, part and j, in the order of `interleave`.
template <class Q>
inline void accumulate_integer_tile(const QuantisedRow* rows, const QuantisedRow* next, const float* h, size_t width,
                                    float* sums) {
  constexpr size_t parts = IntegerStep<Q>::parts, blocks_each = kElements<Q> / kIntegerBlock;
  const size_t blocks = width / kIntegerBlock;
  const __m512i of_step = block_of_lane(16 / blocks_each);
  IntegerWeights weights{};
  for (size_t s = 0; s < integer_steps<Q>(width); ++s) {
    const size_t first = s * blocks_each;
    if (first % 16 == 0) weights = round_weights<Q>(rows, h, first, blocks);
    fetch_step(next, s, blocks);
    const __m512i spread = _mm512_add_epi32(of_step, _mm512_set1_epi32(static_cast<int>(first % 16)));
    const auto here = [&](__m512i of) { return _mm512_maskz_permutexvar_epi32(0xffff, spread, of); };
    __m512i bytes[kBlock], mixed[2][4];
    for (size_t r = 0; r < kBlock; ++r) bytes[r] = load_step<Q>(rows[r], s, width);
    for (size_t g = 0; g < 2; ++g) interleave(bytes + 4 * g, mixed[g]);
    const __m512i high[2] = {here(weights.high[0]), here(weights.high[1])};
    const __m512i low[2] = {here(weights.low[0]), here(weights.low[1])}, start = here(weights.start);
    const __m512 scale = _mm512_maskz_permutexvar_ps(0xffff, spread, weights.scale);
    for (size_t p = 0; p < parts; ++p)
      for (size_t j = 0; j < 4; ++j) {
        __m512i upper = _mm512_setzero_si512(), lower = start;
        for (size_t g = 0; g < 2; ++g) {
          const __m512i w = part_of<Q>(mixed[g][j], p);
          upper = _mm512_dpbusd_epi32(upper, w, high[g]);
          lower = _mm512_dpbusd_epi32(lower, w, low[g]);
        }
        const __m512i total = joined(upper, lower);
        float* sum = sums + ((s * parts + p) * 4 + j) * 16;
        _mm512_store_ps(sum, _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, total), scale, _mm512_load_ps(sum)));
      }
  }
}

// y += sums, reordered as in the row.
template <class Q>
inline void add_in_order(const float* sums, size_t width, float* y) {
  constexpr size_t parts = IntegerStep<Q>::parts;
  for (size_t first = 0; first < width; first += 16 * parts) {  // the elements of a lane
    const float* lane = sums + first / kElements<Q> * kElements<Q> + first % kElements<Q> / (4 * parts);
    for (size_t j = 0; j < 4; ++j) {
      const __m128 even = _mm_load_ps(lane + j * 16);
      float* to = y + first + 4 * parts * j;
      if (parts == 1) {
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), even));
      } else {
        const __m128 odd = _mm_load_ps(lane + 64 + j * 16);
        _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), _mm_unpacklo_ps(even, odd)));
        _mm_storeu_ps(to + 4, _mm_add_ps(_mm_loadu_ps(to + 4), _mm_unpackhi_ps(even, odd)));
      }
    }
  }
}

template <class Q>
void accumulate_integers(const Rows& rows, Picks picks, const float* h, float* y, Ahead ahead) {
  alignas(64) float sums[kMostIntegers];
  memset(sums, 0, integer_steps<Q>(rows.width) * kElements<Q> * sizeof(float));
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, size_t count) {
    float weights[kBlock] = {};
    memcpy(weights, h + i, count * sizeof(float));
    accumulate_integer_tile<Q>(now, next, weights, rows.width, sums);
  });
  add_in_order<Q>(sums, rows.width, y);
}
