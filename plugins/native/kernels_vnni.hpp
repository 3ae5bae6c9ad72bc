// One token's projection in integers, part of kernels_quantised.hpp: four products an instruction and lane (AVX-512 VNNI).
//
// The input is rounded to 15 bits and a scale for every block, and multiplied in two parts of 8 bits: 128 times finer
// than rounding it to 8 bits, as dense int8 arithmetic does, at twice the multiplications.
#pragma once

constexpr size_t kIntegerBlock = 32, kMostIntegers = 1 << 14;

// Bytes of a step: 64 of a row. At 8 bits they hold 64 elements, at 4 bits 128, even ones in the lower halves.
template <class Q>
constexpr size_t kElements = 512 / Q::bits;

// The input of a step, in the order of the bytes of a row.
template <class Q>
struct alignas(64) IntegerStep {
  static constexpr size_t parts = 8 / Q::bits;  // even and odd elements apart at 4 bits
  int8_t high[parts][64], low[parts][64];
  int32_t start[16];  // the middle of the integers times the input, to be taken away
  float scale[16];
};

template <class Q>
inline size_t integer_steps(size_t width) {
  return (width + kElements<Q> - 1) / kElements<Q>;
}

template <class Q>
inline void round_input(const float* x, size_t width, IntegerStep<Q>* steps) {
  constexpr size_t parts = IntegerStep<Q>::parts, lanes = 16 * kIntegerBlock / kElements<Q>;
  const size_t count = integer_steps<Q>(width);
  if (width % kElements<Q> != 0) memset(steps + count - 1, 0, sizeof *steps);
  for (size_t first = 0; first < width; first += kIntegerBlock) {
    IntegerStep<Q>& step = steps[first / kElements<Q>];
    const size_t block = first % kElements<Q> / kIntegerBlock;
    V in[2];
    Q::split(x + first, in);
    const __m512 largest = _mm512_max_ps(_mm512_abs_ps((__m512)in[0]), _mm512_abs_ps((__m512)in[1]));
    const float most = _mm512_reduce_max_ps(largest);
    const float inverse = most > 1e-30f ? 16256 / most : 0;
    for (size_t j = 0; j < 2; ++j) {
      const __m512i whole = _mm512_maskz_cvtps_epi32(0xffff, (__m512)(in[j] * inverse));
      const __m512i high = _mm512_maskz_srai_epi32(0xffff, _mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(whole, _mm512_maskz_slli_epi32(0xffff, high, 7));
      const size_t part = parts == 1 ? 0 : j, at = parts == 1 ? block * 32 + j * 16 : block * 16;
      _mm_store_si128(reinterpret_cast<__m128i*>(step.high[part] + at), _mm512_maskz_cvtepi32_epi8(0xffff, high));
      _mm_store_si128(reinterpret_cast<__m128i*>(step.low[part] + at), _mm512_maskz_cvtepi32_epi8(0xffff, low));
    }
    for (size_t l = 0; l < lanes; ++l) step.scale[block * lanes + l] = most / 16256;
  }
  const __m512i ones = _mm512_set1_epi8(1), middle = _mm512_set1_epi32(-(1 << (Q::bits - 1)));
  for (size_t s = 0; s < count; ++s) {
    __m512i high = _mm512_setzero_si512(), low = high;
    for (size_t p = 0; p < parts; ++p) {
      high = _mm512_dpbusd_epi32(high, ones, _mm512_load_si512(steps[s].high[p]));
      low = _mm512_dpbusd_epi32(low, ones, _mm512_load_si512(steps[s].low[p]));
    }
    const __m512i sum = _mm512_add_epi32(low, _mm512_maskz_slli_epi32(0xffff, high, 7));
    _mm512_store_si512(steps[s].start, _mm512_mullo_epi32(sum, middle));
  }
}

template <class Q, size_t R>
inline void project_integer_tile(const QuantisedRow* rows, const QuantisedRow* next, const IntegerStep<Q>* steps,
                                 size_t width, float* out) {
  constexpr size_t blocks_each = kElements<Q> / kIntegerBlock, lanes_each = 16 / blocks_each;
  const size_t blocks = width / kIntegerBlock, bytes = width * Q::bits / 8;
  int32_t block_of_lane[16];
  for (size_t l = 0; l < 16; ++l) block_of_lane[l] = static_cast<int32_t>(l / lanes_each);
  const __m512i spread = _mm512_loadu_si512(block_of_lane), half = _mm512_set1_epi8(15);
  __m512 acc[R];
  for (size_t r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  for (size_t s = 0; s < integer_steps<Q>(width); ++s) {
    if (next != nullptr)
      for (size_t r = 0; r < R; ++r) {
        fetch_bytes(next[r].data + s * 64, 64);
        if (s == 0) fetch_bytes(next[r].scales, blocks * sizeof(float));
      }
    const IntegerStep<Q>& step = steps[s];
    const size_t left = bytes - s * 64, blocks_left = blocks - s * blocks_each;
    const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    const __mmask16 scaled = static_cast<__mmask16>((1u << (blocks_left < blocks_each ? blocks_left : blocks_each)) - 1);
    const __m512i start = _mm512_load_si512(step.start);
    const __m512 scale = _mm512_load_ps(step.scale);
    for (size_t r = 0; r < R; ++r) {
      const __m512i data = _mm512_maskz_loadu_epi8(there, rows[r].data + s * 64);
      __m512i high = _mm512_setzero_si512(), low = start;
      for (size_t p = 0; p < IntegerStep<Q>::parts; ++p) {
        __m512i w = data;
        if (Q::bits == 4) w = _mm512_and_si512(p == 0 ? data : _mm512_srli_epi16(data, 4), half);
        high = _mm512_dpbusd_epi32(high, w, _mm512_load_si512(step.high[p]));
        low = _mm512_dpbusd_epi32(low, w, _mm512_load_si512(step.low[p]));
      }
      const __m512i total = _mm512_add_epi32(low, _mm512_maskz_slli_epi32(0xffff, high, 7));
      const __m512 scales = _mm512_maskz_loadu_ps(scaled, rows[r].scales + s * blocks_each);
      const __m512 product = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, total), scale);
      acc[r] = _mm512_fmadd_ps(product, _mm512_maskz_permutexvar_ps(0xffff, spread, scales), acc[r]);
    }
  }
  for (size_t r = 0; r < R; ++r) out[r] = sum((V)acc[r]);
}

template <class Q>
void project_integers(const Rows& rows, Picks picks, const float* x, float* out, Ahead ahead) {
  IntegerStep<Q> steps[kMostIntegers / kElements<Q>];
  round_input<Q>(x, rows.width, steps);
  walk_quantised(rows, picks, ahead, [&](const QuantisedRow* now, const QuantisedRow* next, size_t i, auto count) {
    project_integer_tile<Q, count.value>(now, next, steps, rows.width, out + i);
  });
}
