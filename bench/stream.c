/* One thread's part of the 3-read 2-write ceiling: m += g, p -= m. */
void stream(float* restrict p, const float* restrict g, float* restrict m, long n) {
  for (long i = 0; i < n; ++i) {
    m[i] += g[i];
    p[i] -= m[i];
  }
}
