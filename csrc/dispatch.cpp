// Which instruction set's kernels run.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace aerogel {

// AEROGEL_HAS_<isa>: its kernels are part of this build.
#ifdef AEROGEL_HAS_avx512
namespace avx512 { extern const KernelTable kTable; }
#endif
#ifdef AEROGEL_HAS_avx2
namespace avx2 { extern const KernelTable kTable; }
#endif
#ifdef AEROGEL_HAS_neon
namespace neon { extern const KernelTable kTable; }
#endif
#ifdef AEROGEL_HAS_generic
namespace generic { extern const KernelTable kTable; }
#endif

namespace {

// Best first; generic is last, and there unless a build left it out.
std::vector<const KernelTable*> supported_tables() {
  std::vector<const KernelTable*> tables;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  [[maybe_unused]] const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef AEROGEL_HAS_avx512
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    tables.push_back(&avx512::kTable);
  }
#endif
#ifdef AEROGEL_HAS_avx2
  if (has_avx2) tables.push_back(&avx2::kTable);
#endif
#ifdef AEROGEL_HAS_neon
  tables.push_back(&neon::kTable);
#endif
#ifdef AEROGEL_HAS_generic
  tables.push_back(&generic::kTable);
#endif
  if (tables.empty()) throw std::runtime_error("this build has no kernels for this machine");
  return tables;
}

const KernelTable* find_table(const std::string& name) {
  std::string names;
  for (const KernelTable* table : supported_tables()) {
    if (name == table->name) return table;
    names += names.empty() ? "" : ", ";
    names += table->name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here; available: " +
                              names);
}

const KernelTable* initial_table() {
  const char* wanted = std::getenv("AEROGEL_ISA");
  return wanted && *wanted ? find_table(wanted) : supported_tables().front();
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial_table()};
  return table;
}

}  // namespace

const KernelTable& active_table() { return *current().load(std::memory_order_acquire); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : supported_tables()) names.emplace_back(table->name);
  return names;
}

void select_isa(const std::string& name) {
  current().store(find_table(name), std::memory_order_release);
}

}  // namespace aerogel
