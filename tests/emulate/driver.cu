// Runs the kernels of kernels.cu against plain loops: `driver CASE` says "right" or names the first wrong
// value, `driver speed` times threads, `driver fault NAME` runs a kernel of faults.cu.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "faults.cu"
#include "kernels.cu"

namespace {

using fastmerge::launch;
using toys::block_threads;

constexpr int blocks = 5;
constexpr long long n = blocks * block_threads - 77;  // the last block is not full

/// Device memory that goes with the scope.
template <class T>
struct Array {
    T* at = nullptr;
    size_t size;

    explicit Array(size_t size_) : size(size_) { cudaMalloc(&at, size * sizeof(T)); }
    explicit Array(const std::vector<T>& host) : Array(host.size()) {
        cudaMemcpy(at, host.data(), size * sizeof(T), cudaMemcpyHostToDevice);
    }
    ~Array() { cudaFree(at); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    std::vector<T> read() const {
        std::vector<T> host(size);
        cudaDeviceSynchronize();
        cudaMemcpy(host.data(), at, size * sizeof(T), cudaMemcpyDeviceToHost);
        return host;
    }
};

std::vector<unsigned> numbers(size_t count) {
    std::vector<unsigned> out(count);
    unsigned x = 12345;
    for (unsigned& v : out) v = (x = x * 1664525u + 1013904223u) >> 12;
    return out;
}

template <class T>
int compare(const std::vector<T>& got, const std::vector<T>& want) {
    for (size_t i = 0; i < want.size(); ++i)
        if (got[i] != want[i])
            return printf("wrong: [%zu] is %g, not %g\n", i, double(got[i]), double(want[i])), 1;
    puts("right");
    return 0;
}

std::vector<unsigned> sums(const std::vector<unsigned>& in, size_t group, size_t count) {
    std::vector<unsigned> out(count);
    for (size_t i = 0; i < in.size(); ++i) out[i / group] += in[i];
    return out;
}

int reduce_block() {
    const auto in = numbers(n);
    Array<unsigned> device_in(in), out(blocks);
    launch(toys::reduce_block_kernel, blocks, block_threads, block_threads * sizeof(unsigned), nullptr,
           device_in.at, out.at, n);
    return compare(out.read(), sums(in, block_threads, blocks));
}

int reduce_warp() {
    const auto in = numbers(blocks * block_threads);
    Array<unsigned> device_in(in), out(in.size() / 32);
    launch(toys::reduce_warp_kernel, blocks, block_threads, block_threads * sizeof(unsigned), nullptr,
           device_in.at, out.at);
    return compare(out.read(), sums(in, 32, out.size));
}

int reduce_shuffle() {
    const auto in = numbers(n);
    const auto want = sums(in, block_threads, blocks);
    Array<unsigned> device_in(in);
    Array<double> out(blocks);
    launch(toys::reduce_shuffle_kernel, blocks, block_threads, block_threads / 32 * sizeof(double), nullptr,
           device_in.at, out.at, n);
    return compare(out.read(), std::vector<double>(want.begin(), want.end()));
}

int count_bytes() {
    const auto in = numbers(5000);
    std::vector<unsigned long long> want(256);
    for (unsigned v : in) ++want[v & 255u];
    Array<unsigned> device_in(in);
    Array<unsigned long long> counts(256);
    cudaMemsetAsync(counts.at, 0, 256 * sizeof(unsigned long long), nullptr);
    launch(toys::count_bytes_kernel, blocks, block_threads, 256 * sizeof(unsigned), nullptr, device_in.at,
           counts.at, (long long)in.size());
    return compare(counts.read(), want);
}

int compact_odd() {
    const auto in = numbers(n);
    std::vector<int> want_kept(blocks);
    std::vector<unsigned> want, got;
    for (size_t i = 0; i < in.size(); ++i)
        if (in[i] & 1u) ++want_kept[i / block_threads], want.push_back(in[i]);
    Array<unsigned> device_in(in), out(blocks * block_threads);
    Array<int> kept(blocks);
    launch(toys::compact_odd_kernel, blocks, block_threads, block_threads / 32 * sizeof(int), nullptr,
           device_in.at, out.at, kept.at, n);
    if (kept.read() != want_kept) return puts("wrong: other counts"), 1;
    const auto all = out.read();
    for (int b = 0; b < blocks; ++b)
        got.insert(got.end(), all.begin() + b * block_threads,
                   all.begin() + b * block_threads + want_kept[size_t(b)]);
    return compare(got, want);
}

int count_keys() {
    const auto in = numbers(n);
    std::vector<unsigned> want(8);
    for (unsigned v : in) ++want[v & 7u];
    Array<unsigned> device_in(in), counts(8);
    cudaMemset(counts.at, 0, 8 * sizeof(unsigned));
    launch(toys::count_keys_kernel, blocks, block_threads, 0, nullptr, device_in.at, counts.at, n);
    return compare(counts.read(), want);
}

int sum_at_last() {
    const auto in = numbers(blocks * block_threads);
    Array<unsigned> device_in(in), partial(blocks), ticket(std::vector<unsigned>{0}), total(1);
    launch(toys::sum_at_last_kernel, blocks, block_threads, 2 * sizeof(unsigned), nullptr, device_in.at,
           partial.at, ticket.at, total.at);
    return compare(total.read(), sums(in, in.size(), 1));
}

/// Against CUDA's own account of the four shuffles, one distance after another.
int shuffle() {
    for (int by = 0; by < 32; ++by) {
        std::vector<int> want(6 * 128);
        for (int i = 0; i < 6 * 32; ++i) {
            const int lane = i % 32, width = 1 << i / 32, first = lane / width * width, end = first + width;
            int* row = &want[size_t(i / 32 * 128 + lane)];
            row[0] = first + by % width;
            row[32] = lane - by < first ? lane : lane - by;
            row[64] = lane + by >= end ? lane : lane + by;
            row[96] = (lane ^ by) >= end ? lane : lane ^ by;
        }
        Array<int> out(want.size());
        launch(toys::shuffle_kernel, 1, 32, 0, nullptr, out.at, by);
        const auto got = out.read();
        if (got != want) return printf("distance %d: ", by), compare(got, want);
    }
    puts("right");
    return 0;
}

int copy_stream() {
    std::vector<unsigned char> in(16 * 100);
    for (size_t i = 0; i < in.size(); ++i) in[i] = (unsigned char)(i * 7);
    Array<unsigned char> device_in(in), out(in.size());
    launch(toys::copy_stream_kernel, 4, 32, 0, nullptr, device_in.at, out.at, 100);
    return compare(out.read(), in);
}

int count_threads_wrongly() {
    Array<unsigned> counter(std::vector<unsigned>{0}), other(std::vector<unsigned>{0});
    launch(toys::count_threads_wrongly_kernel, 1, 64, 0, nullptr, counter.at, other.at);
    return compare(counter.read(), {64});
}

#if !defined(__CUDACC__)
/// What the host can check of the intrinsics without a kernel.
int intrinsics() {
    const double nan = double(nanf(""));
    const float above_one = 1.0f + 0x1p-23f;
    const std::vector<std::pair<double, double>> pairs{
        {__clz(0), 32},
        {__clz(-1), 0},
        {__clz(1), 31},
        {__clzll(0), 64},
        {__ffs(0), 0},
        {__ffs(-1), 1},
        {__ffs(48), 5},
        {__popc(0xf0f0u), 8},
        {__brev(1u), 0x80000000u},
        {__brev(0x12345678u), 0x1e6a2c48u},
        {__umulhi(~0u, ~0u), 0xfffffffeu},
        {__byte_perm(0x03020100u, 0x07060504u, 0x5432u), 0x05040302u},
        {__byte_perm(0x33221100u, 0x77665544u, 0x7531u), 0x77553311u},
        {__funnelshift_l(0xabcdef01u, 0x34567890u, 8u), 0x567890abu},
        {__funnelshift_l(0xabcdef01u, 0x34567890u, 32u), 0x34567890u},
        {__funnelshift_r(0x34567890u, 0x12u, 4u), 0x23456789u},
        {min(1, 2u), 1},
        {max(-1, 0u), 0xffffffffu},  // signs meet as unsigned
        {min(-1, 1), -1},
        {min(1.0, nan), 1},
        {__uint_as_float(0x3f800000u), 1},
        {double(__double_as_longlong(1.0)), double(0x3ff0000000000000ll)},
        {__fmaf_rn(above_one, above_one, -(1.0f + 0x1p-22f)), 0x1p-46},
        {__fadd_rn(__fmul_rn(above_one, above_one), -(1.0f + 0x1p-22f)), 0},  // no contraction
    };
    std::vector<double> got, want;
    for (const auto& [is, should] : pairs) got.push_back(is), want.push_back(should);
    return compare(got, want);
}
#endif

// ---- speed ----------------------------------------------------------------------------------------------

template <class Run>
double seconds(Run run) {
    run();
    const auto start = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int speed() {
    const int count = 2000;
    Array<unsigned> out(size_t(count) * block_threads);
    const double threads = double(count) * block_threads;
    for (int waits : {0, 1, 20}) {
        const double barrier =
            seconds([&] { launch(toys::wait_kernel, count, block_threads, 0, nullptr, out.at, waits); });
        const double shuffle =
            seconds([&] { launch(toys::exchange_kernel, count, block_threads, 0, nullptr, out.at, waits); });
        printf(
            "%2d waits: barriers %.3g threads/s, %.3g ms a block; shuffles %.3g threads/s, %.3g ms a block\n",
            waits, threads / barrier, barrier / count * 1e3, threads / shuffle, shuffle / count * 1e3);
    }
    return 0;
}

const struct {
    const char* name;
    int (*run)();
} cases[] = {
    {"reduce_block", reduce_block},
    {"reduce_warp", reduce_warp},
    {"reduce_shuffle", reduce_shuffle},
    {"count_bytes", count_bytes},
    {"compact_odd", compact_odd},
    {"count_keys", count_keys},
    {"sum_at_last", sum_at_last},
    {"shuffle", shuffle},
    {"copy_stream", copy_stream},
    {"count_threads_wrongly", count_threads_wrongly},
#if !defined(__CUDACC__)
    {"intrinsics", intrinsics},
#endif
    {"speed", speed},
};

}  // namespace

int main(int argc, char** argv) {
    if (argc == 3 && strcmp(argv[1], "fault") == 0) faults::run(argv[2]);
    for (const auto& c : cases)
        if (argc == 2 && strcmp(argv[1], c.name) == 0) return c.run();
    fprintf(stderr, "no such case\n");
    return 2;
}
