// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What the quantile of the standard normal distribution is made of; base/philox.cpp puts it
// together for one number, param/cpu for many at a time.
#pragma once
namespace capstan::normal_quantile {

using Coefficients = double[8];

// Rational interpolation of the quantile at Chebyshev nodes (degree 7 over 7, computed with 50
// digits). Centre: x / q as a function of 0.425^2 - q^2 with q = p - 1/2, relative error 6e-15.
inline constexpr Coefficients kCentreP = {3.3871328727963461, 128.73512822626552, 1830.557477937655,
                                          12139.224890161133, 38265.211315474036, 52232.98928941886,
                                          23904.103116721089, 1633.0122843613899};
inline constexpr Coefficients kCentreQ = {1.0,
                                          41.012366189413981,
                                          641.63926453705142,
                                          4815.8575298189162,
                                          17948.909812326499,
                                          31203.393040319792,
                                          21170.851303740594,
                                          3539.5413098121762};
// Tails: |x| as a function of r - 1.6 (r <= 5, error 6e-15) and r - 5 (r <= 27.5, error 2e-13) with
// r = sqrt(-log(min(p, 1 - p))).
inline constexpr Coefficients kTailP = {
    1.4234371107496915, 4.7986967274575738,  6.2962569570520621,   4.2474424999990754,
    1.5853303740560594, 0.32045027191916492, 0.031250394211131127, 0.0010675107206190402};
inline constexpr Coefficients kTailQ = {1.0,
                                        2.1714679312462626,
                                        1.9045463196807437,
                                        0.84748946832291627,
                                        0.19517067468966826,
                                        0.020898582748951039,
                                        0.00075473040847282068,
                                        1.1825888713836057e-09};
inline constexpr Coefficients kFarP = {
    6.657904643501853,   5.3468361292879854,    1.7005399074782357,     0.27324295174654101,
    0.02341843187257182, 0.0010368553888037099, 2.1006472849990823e-05, 1.4142939045152984e-07};
inline constexpr Coefficients kFarQ = {1.0,
                                       0.58226680300586153,
                                       0.12814893637172942,
                                       0.013289149217647124,
                                       0.00066174860410373099,
                                       1.435400837581971e-05,
                                       1.0000517920203415e-07,
                                       9.4072865387428962e-16};

}  // namespace capstan::normal_quantile
