// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Normal initial values: u = (52 random bits + 1/2) 2^-52 by Philox, out = quantile(u) x deviation
// in fp64, a rational approximation out of IEEE operations alone.
// Memory per element: one write; bound by fp64 arithmetic. Reference: src/base/philox.cpp, the same
// bits.
#include "capstan/kernels/init.h"

#include "dispatch.h"
#include "philox.cuh"

namespace capstan::kernels {
namespace {

// The coefficients of base/normal_quantile.h, which device code cannot read.
__device__ constexpr double kCentreP[8] = {
    3.3871328727963461, 128.73512822626552, 1830.557477937655,  12139.224890161133,
    38265.211315474036, 52232.98928941886,  23904.103116721089, 1633.0122843613899};
__device__ constexpr double kCentreQ[8] = {1.0,
                                           41.012366189413981,
                                           641.63926453705142,
                                           4815.8575298189162,
                                           17948.909812326499,
                                           31203.393040319792,
                                           21170.851303740594,
                                           3539.5413098121762};
// Tails: |x| as a function of r - 1.6 (r <= 5, error 6e-15) and r - 5 (r <= 27.5, error 2e-13) with
// r = sqrt(-log(min(p, 1 - p))).
__device__ constexpr double kTailP[8] = {
    1.4234371107496915, 4.7986967274575738,  6.2962569570520621,   4.2474424999990754,
    1.5853303740560594, 0.32045027191916492, 0.031250394211131127, 0.0010675107206190402};
__device__ constexpr double kTailQ[8] = {1.0,
                                         2.1714679312462626,
                                         1.9045463196807437,
                                         0.84748946832291627,
                                         0.19517067468966826,
                                         0.020898582748951039,
                                         0.00075473040847282068,
                                         1.1825888713836057e-09};
__device__ constexpr double kFarP[8] = {
    6.657904643501853,   5.3468361292879854,    1.7005399074782357,     0.27324295174654101,
    0.02341843187257182, 0.0010368553888037099, 2.1006472849990823e-05, 1.4142939045152984e-07};
__device__ constexpr double kFarQ[8] = {1.0,
                                        0.58226680300586153,
                                        0.12814893637172942,
                                        0.013289149217647124,
                                        0.00066174860410373099,
                                        1.435400837581971e-05,
                                        1.0000517920203415e-07,
                                        9.4072865387428962e-16};

__device__ __forceinline__ double polynomial(const double (&coefficients)[8], double x) {
  double value = coefficients[7];
  for (int i = 6; i >= 0; --i) value = value * x + coefficients[i];
  return value;
}

__device__ double natural_log(double x) {
  int64_t shift = 0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    shift = -54;
  }
  const uint64_t bits = bits_of_double(x);
  int64_t exponent = static_cast<int64_t>(bits >> 52) - 1023 + shift;
  double m = double_of_bits((bits & 0x000FFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double f = (m - 1.0) / (m + 1.0), s = f * f;
  double series = 0.0;
  CAPSTAN_UNROLL
  for (int k = 21; k >= 1; k -= 2) series = series * s + 1.0 / k;
  return static_cast<double>(exponent) * 0.69314718055994531 + 2.0 * f * series;
}

__device__ double inverse_normal_cdf(double p) {
  const double q = p - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * polynomial(kCentreP, r) / polynomial(kCentreQ, r);
  }
  const double r = sqrt(-natural_log(q < 0.0 ? p : 1.0 - p));
  const double x = r <= 5.0 ? polynomial(kTailP, r - 1.6) / polynomial(kTailQ, r - 1.6)
                            : polynomial(kFarP, r - 5.0) / polynomial(kFarQ, r - 5.0);
  return q < 0.0 ? -x : x;
}

template <class T>
__global__ void fill_kernel(const FillNormalArgs a) {
  for (int64_t i = first_index(); i < a.count; i += all_threads()) {
    const int64_t index = i / a.length * a.stride + i % a.length;
    const PhiloxBits random = philox(a.seed, a.stream, a.first + static_cast<uint64_t>(index));
    const uint64_t bits = static_cast<uint64_t>(random.word[1]) << 32 | random.word[0];
    const double u = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
    static_cast<T*>(a.out)[i] =
        narrow<T>(static_cast<Wide<T>>(inverse_normal_cdf(u) * a.deviation));
  }
}

}  // namespace

void fill_normal(const FillNormalArgs& args, Stream stream) {
  check_sizes("fill_normal", {args.count, args.length - 1, args.stride});
  if (args.count == 0) return;
  check_present("fill_normal", {{"out", args.out}});
  with_float("fill_normal", args.dtype, [&](auto tag) {
    launch("fill_normal", flat_shape(args.count, 4), stream, fill_kernel<TypeOf<decltype(tag)>>,
           args);
  });
}

}  // namespace capstan::kernels
