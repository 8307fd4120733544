// Tensors that are stored as codes, operands and results: a few thousand elements at a time pass through
// float32 in the first cache, between the codecs of core/four_bit and the loops that know nothing of codes.

constexpr int64_t TILE_ELEMENTS = 2048;

inline bool is_coded(const Operands& in) {
    bool coded = in.base && in.base_type == DType::Coded;
    for (int k = 0; k < in.n_experts; ++k) coded |= in.expert_type[k] == DType::Coded;
    return coded;
}

/// One tile's operands as float32 (where float64 is computed in, those that are not coded as they are).
class DecodedTile {
  public:
    DecodedTile(const Operands& in, bool f64) : in_(in), view_(in), f64_(f64) {
        const size_t n = size_t(in.n_experts) + 1;
        values_.reset(new float[n * TILE_ELEMENTS]);
        experts_.reset(new const void*[n]), types_.reset(new DType[n]);
        view_.expert = experts_.get(), view_.expert_type = types_.get();
    }
    /// The operands with elements [i, i + m) decoded; only these may be read.
    const Operands& at(int64_t i, int m) {
        float* to = values_.get();
        for (int k = 0; k < in_.n_experts; ++k, to += TILE_ELEMENTS)
            types_[k] = load(in_.expert[k], in_.expert_type[k], i, m, to, experts_[k]);
        if (in_.base) view_.base_type = load(in_.base, in_.base_type, i, m, to, view_.base);
        return view_;
    }

  private:
    DType load(const void* from, DType type, int64_t i, int m, float* to, const void*& data) const {
        if (type == DType::F32 || (f64_ && type != DType::Coded)) {
            data = from;
            return type;
        }
        if (type == DType::Coded)
            decode_run(*static_cast<const Coded*>(from), i, m, to);
        else
            load_run<float>(from, type, i, m, to);
        data = to - i;  // kernels count from the chunk's first element
        return DType::F32;
    }
    const Operands& in_;
    Operands view_;
    bool f64_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<const void*[]> experts_;
    std::unique_ptr<DType[]> types_;
};

/// f(operands, i, j) over [a, b) in tiles that begin on blocks.
template <class F>
void by_tile(const Operands& in, bool f64, int64_t a, int64_t b, F&& f) {
    DecodedTile tile(in, f64);
    for (int64_t i = a; i < b;) {
        const int64_t end = std::min(b, i + TILE_ELEMENTS - (in.start + i) % BLOCK);
        f(tile.at(i, int(end - i)), i, end);
        i = end;
    }
}

bool walk(const WalkPlan& p, const Operands& in, const Ranks& r, bool f64, int64_t a, int64_t b, void* out,
          DType t);

inline void add_residual(const float* x, const float* decoded, int64_t n, double* sums) {
    float errors[BLOCK] = {}, squares[BLOCK] = {};
    int64_t i = 0;
    for (; i + BLOCK <= n; i += BLOCK)
        for (int j = 0; j < BLOCK; ++j) {
            const float e = decoded[i + j] - x[i + j];
            errors[j] += e * e, squares[j] += x[i + j] * x[i + j];
        }
    for (int j = 0; i + j < n; ++j) {
        const float e = decoded[i + j] - x[i + j];
        errors[j] += e * e, squares[j] += x[i + j] * x[i + j];
    }
    for (int j = 0; j < BLOCK; ++j) sums[0] += double(errors[j]), sums[1] += double(squares[j]);
}

/// Merge rows [row, row + rows), columns [col, col + cols) of the tensor and code them; true if an operand,
/// or what was merged as the type that is coded, is not finite. scratch: 8 bytes for each element. residual:
/// gets the sums of squared errors and of squares added.
bool walk_coded(const WalkPlan& plan, const Operands& in, const Ranks& ranks, bool f64, const Coded& out,
                int64_t row, int rows, int64_t col, int64_t cols, void* scratch, double* residual) {
    float* x = static_cast<float*>(scratch);
    float* merged = x + rows * cols;  // of type out.type
    bool bad = false;
    for (int r = 0; r < rows; ++r) {
        const int64_t i = (row + r) * out.cols + col - in.start;
        char* to = reinterpret_cast<char*>(out.type == DType::F32 ? x + r * cols : merged);
        bad |= walk(plan, in, ranks, f64, i, i + cols, to - i * itemsize(out.type), out.type);
        if (out.type != DType::F32) load_run<float>(merged, out.type, 0, int(cols), x + r * cols);
    }
    uint32_t largest = 0;
    for (int64_t j = 0; j < rows * cols; ++j) {
        const uint32_t key = key_of(x[j]);
        largest = key > largest ? key : largest;
    }
    bad |= largest >= KeyOf<float>::inf;
    if (bad) return true;
    encode_tile(out, row, rows, col, cols, x, cols);
    for (int r = 0; r < rows; ++r) {
        const int64_t i = (row + r) * out.cols + col - out.first;
        decode_run(out, i, int(cols), merged);
        add_residual(x + r * cols, merged, cols, residual);
    }
    return false;
}

/// The largest magnitude of merged elements [a, b) as `type`, as a key; true if an operand is not finite.
bool walk_peak(const WalkPlan& plan, const Operands& in, const Ranks& ranks, bool f64, DType type, int64_t a,
               int64_t b, uint32_t* peak) {
    float x[TILE_ELEMENTS], merged[TILE_ELEMENTS];
    bool bad = false;
    for (int64_t i = a; i < b; i += TILE_ELEMENTS) {
        const int m = int(std::min(TILE_ELEMENTS, b - i));
        bad |=
            walk(plan, in, ranks, f64, i, i + m, reinterpret_cast<char*>(merged) - i * itemsize(type), type);
        load_run<float>(merged, type, 0, m, x);
        for (int j = 0; j < m; ++j) {
            const uint32_t key = key_of(x[j]);
            *peak = key > *peak ? key : *peak;
        }
    }
    return bad || *peak >= KeyOf<float>::inf;
}
