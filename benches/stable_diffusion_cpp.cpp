// Times one forward pass of stable-diffusion.cpp's Qwen-Image transformer; compare.sh runs it in turn
// with the others.
//
//   stable_diffusion_cpp TRANSFORMER.safetensors INPUTS SIDE TEXT_TOKENS THREADS TYPE REPEATS
//
// INPUTS is a folder with target.bin and reference.bin, latents [16, SIDE, SIDE] in float32, and
// text.bin, [TEXT_TOKENS, 3584]. TYPE is the type of the matrices: q8_0, bf16 or f32, with -fa behind
// it for the library's flash attention. Prints one line for each repeat after a first, untimed one:
//
//   seconds,peak_bytes,checksum
//
// The checksum is the mean magnitude of the output, to see that all sides did the same work.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "model.h"
#include "qwen_image.hpp"

static const char* const PREFIX = "model.diffusion_model.";
static const float TIMESTEP     = 500.0f;

static sd::Tensor<float> read(const std::string& path, std::vector<int64_t> shape) {
    sd::Tensor<float> tensor(std::move(shape));
    std::ifstream file(path, std::ios::binary);
    auto bytes = static_cast<std::streamsize>(tensor.numel() * sizeof(float));
    if (!file.read(reinterpret_cast<char*>(tensor.data()), bytes)) {
        std::fprintf(stderr, "%s: expected %ld bytes\n", path.c_str(), static_cast<long>(bytes));
        std::exit(1);
    }
    return tensor;
}

static long peak_bytes() {
    std::ifstream status("/proc/self/status");
    std::string line;
    while (std::getline(status, line)) {
        if (line.rfind("VmHWM:", 0) == 0) {
            return 1024 * std::atol(line.c_str() + std::strlen("VmHWM:"));
        }
    }
    return 0;
}

int main(int argc, char** argv) {
    if (argc != 8) {
        std::fprintf(stderr, "expected 7 arguments, found %d\n", argc - 1);
        return 2;
    }
    const std::string model_path = argv[1], inputs = argv[2];
    const int64_t side = std::atol(argv[3]), text_tokens = std::atol(argv[4]);
    const int threads = std::atoi(argv[5]), repeats = std::atoi(argv[7]);
    std::string type = argv[6];
    const bool flash = type.size() > 3 && type.substr(type.size() - 3) == "-fa";
    if (flash) {
        type.resize(type.size() - 3);
    }
    const ggml_type matrices = type == "q8_0" ? GGML_TYPE_Q8_0 : type == "bf16" ? GGML_TYPE_BF16
                                                                                : GGML_TYPE_F32;

    ModelLoader loader;
    if (!loader.init_from_file_and_convert_name(model_path, PREFIX)) {
        return 1;
    }
    auto& stored = loader.get_tensor_storage_map();
    for (auto& [name, tensor] : stored) {
        // As the library's own conversion does: matrices only.
        const bool matrix = name.size() > 7 && name.substr(name.size() - 7) == ".weight" && tensor.n_dims == 2;
        tensor.expected_type = matrix ? matrices : GGML_TYPE_F32;
    }
    ggml_backend_t backend = ggml_backend_cpu_init();
    auto runner = std::make_shared<Qwen::QwenImageRunner>(backend, false, stored, "model.diffusion_model",
                                                          VERSION_QWEN_IMAGE);
    runner->set_flash_attention_enabled(flash);
    runner->alloc_params_buffer();
    std::map<std::string, ggml_tensor*> tensors;
    runner->get_param_tensors(tensors, "model.diffusion_model");
    if (!loader.load_tensors(tensors)) {
        return 1;
    }

    const auto target    = read(inputs + "/target.bin", {side, side, 16, 1});
    const auto reference = read(inputs + "/reference.bin", {side, side, 16, 1});
    const auto text      = read(inputs + "/text.bin", {3584, text_tokens, 1});
    const auto timestep  = sd::Tensor<float>::from_vector({TIMESTEP});
    for (int repeat = 0; repeat <= repeats; repeat++) {
        const int64_t start = ggml_time_us();
        auto out            = runner->compute(threads, target, timestep, text, {reference}, true);
        const double seconds = static_cast<double>(ggml_time_us() - start) * 1e-6;
        double sum           = 0.0;
        for (int64_t i = 0; i < out.numel(); i++) {
            sum += std::fabs(out.data()[i]);
        }
        if (repeat > 0) {
            std::printf("%.4f,%ld,%.5f\n", seconds, peak_bytes(), sum / static_cast<double>(out.numel()));
            std::fflush(stdout);
        }
    }
    return 0;
}
