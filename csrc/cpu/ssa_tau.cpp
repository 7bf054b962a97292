// The method "tau": adaptive explicit tau-leaping (Cao, Gillespie and Petzold 2006), an approximation. A leap of length
// tau fires every reaction a Poisson number of times, as if the propensities stood still, and tau is chosen so that they
// nearly do. Where leaps would be short, 100 exact passes take their place.
//
// One bound is added to theirs: a leap may consume no more than 2 epsilon of a count, however much of it is produced.
// Near an equilibrium, where mean changes vanish, their bounds let leaps grow beyond the time in which the equilibrium
// restores itself; fluctuations then grow (measured: immigration-death around 10^6, standard deviation 5 times too
// large). A relaxation of rate r and leaps of length tau make variances too large by a factor 1 / (1 - r tau / 2).
//
// Leaps end at grid times and breakpoints, so that what is recorded is the state at that time and not that of some leap
// around it: other than the exact methods' trajectories, these depend on the grid. Everything else holds as there: the
// same bits at every level, number of threads and split of the ensemble.
#include "ssa.h"
#include "ssa_lane.h"
#include "ssa_poisson.h"

PYGEN_BEGIN_LEVEL
namespace {

constexpr double kCritical = 10.0;    // n_c: a reaction is critical when so few firings use up a reactant
constexpr double kWorthwhile = 10.0;  // a leap must be longer than so many mean waiting times
constexpr int kExactPasses = 100;     // that take the place of a leap
constexpr int32_t kUnknownOrder = 3;  // of a law that is an expression

class Leaper {
 public:
  Leaper(const Network& net, const Ensemble& run, double* memory) : net_(net), run_(run) {
    const auto take = [&](double*& pointer, int64_t count) {
      pointer = memory;
      memory += count;
    };
    take(values_, net.slots);
    take(laws_, net.reactions);
    take(fired_, net.reactions);
    take(mean_, net.species);
    take(variance_, net.species);
    take(consumed_, net.species);
    take(change_, net.species);
    take(order_, net.species);
    take(copies_, net.species);
    find_orders();
  }

  static int64_t scratch_bytes(const Network& net) {
    return (int64_t{net.slots} + 2 * int64_t{net.reactions} + 6 * int64_t{net.species}) * sizeof(double);
  }

  void work() {
    for (int64_t row = claim_row(run_); row >= 0; row = claim_row(run_)) {
      Status status = begin_trajectory(net_, run_, t_, row, values_, 1);
      int exact = 0;
      for (int64_t i = 1; status == kRunning; ++i) {
        if (exact > 0) {
          --exact;
          status = one_pass(net_, run_, t_, values_, 1, laws_);
        } else if (!leap(status)) {
          exact = kExactPasses;
        }
        if (i % kPassesPerLook == 0 && asked_to_stop(run_) && status == kRunning) status = kUnfinished;
      }
      close_trajectory(run_, t_, status, now());
    }
  }

 private:
  double& now() const { return values_[net_.time_slot]; }

  // For every species the highest order of the reactions that it enters, and how many copies of it they take.
  void find_orders() {
    for (int32_t s = 0; s < net_.species; ++s) order_[s] = copies_[s] = 0.0;
    for (int32_t j = 0; j < net_.reactions; ++j) {
      const int32_t begin = net_.factor_start[j], end = net_.factor_start[j + 1];
      for (int32_t f = begin; f < end; ++f) enter(net_.factor_slot[f], end - begin, net_.factor_offset[f] + 1);
    }
    if (!net_.check_laws) return;
    // What a law that is an expression reads is not in the tables: any species might enter it.
    for (int32_t s = 0; s < net_.species; ++s) enter(s, kUnknownOrder, 1);
  }

  void enter(int32_t species, int32_t order, int32_t copies) {
    if (species >= net_.species) return;
    if (order > order_[species]) order_[species] = order, copies_[species] = 0.0;
    if (order == order_[species] && copies > copies_[species]) copies_[species] = copies;
  }

  // g_i: a relative change of x_i by epsilon / g_i changes no propensity by more than epsilon of itself.
  double relevance(int32_t s) const {
    const double x = values_[s], order = order_[s], copies = copies_[s];
    if (copies < 2.0 || x < 3.0) return order;
    if (order == 2.0) return 2.0 + 1.0 / (x - 1.0);
    if (order == 3.0 && copies == 2.0) return 1.5 * (2.0 + 1.0 / (x - 1.0));
    double g = order;  // sum over the factors x - k of x / (x - k)
    for (double k = 1.0; k < copies && k < x; k += 1.0) g += k / (x - k);
    return g;
  }

  bool is_critical(int32_t j) const {
    for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c)
      if (net_.change_delta[c] < 0 &&
          values_[net_.change_slot[c]] < kCritical * -static_cast<double>(net_.change_delta[c]))
        return true;
    return false;
  }

  // The laws and a0; the number of firings of critical reactions is marked -1, of the others 0. NaN: a law is invalid.
  double compute_laws(double& critical) {
    run_program<double, 1>(net_, net_.step_begin, net_.step_end, values_, 1);
    double total = 0.0;
    bool valid = true;
    critical = 0.0;
    for (int32_t j = 0; j < net_.reactions; ++j) {
      const double a = propensity<double>(net_, j, values_, 1);
      valid = valid && a >= 0.0;
      laws_[j] = a;
      total = total + a;
      fired_[j] = a > 0.0 && is_critical(j) ? -1.0 : 0.0;
      if (fired_[j] < 0.0) critical = critical + a;
    }
    return valid && total < kInfinity ? total : kInfinity - kInfinity;
  }

  // The longest leap by which mean and standard deviation of no relevant count change more than they may.
  double longest_leap() {
    for (int32_t s = 0; s < net_.species; ++s) mean_[s] = variance_[s] = consumed_[s] = 0.0;
    for (int32_t j = 0; j < net_.reactions; ++j) {
      if (fired_[j] < 0.0) continue;
      for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c) {
        const double change = net_.change_delta[c];
        mean_[net_.change_slot[c]] += change * laws_[j];
        variance_[net_.change_slot[c]] += change * change * laws_[j];
        if (change < 0.0) consumed_[net_.change_slot[c]] -= change * laws_[j];
      }
    }
    double leap = kInfinity;
    for (int32_t s = 0; s < net_.species; ++s) {
      if (order_[s] == 0.0 || variance_[s] == 0.0) continue;
      const double share = run_.tau_epsilon * values_[s] / relevance(s), most = share > 1.0 ? share : 1.0;
      const double by_mean = most / magnitude(mean_[s]), by_variance = most * most / variance_[s];
      const double consumable = 2.0 * run_.tau_epsilon * values_[s];
      const double by_consumption = (consumable > 1.0 ? consumable : 1.0) / consumed_[s];
      leap = by_mean < leap ? by_mean : leap;
      leap = by_consumption < leap ? by_consumption : leap;
      leap = by_variance < leap ? by_variance : leap;
    }
    return leap;
  }

  // False: a leap is not worth it; nothing has happened.
  bool leap(Status& status) {
    status = write_grid(run_, t_, values_, 1, following(now()));
    double critical = 0.0;
    const double total = compute_laws(critical);
    if (status == kRunning && !(total >= 0.0)) status = kInvalidPropensity;
    if (status == kRunning && t_.grid == run_.n_times) status = total == 0.0 ? kAbsorbed : kCompleted;
    if (status != kRunning) return true;
    if (total == 0.0) {
      ++t_.passes, ++t_.quiet;
      cross(net_, run_, t_, values_, 1, kInfinity, total, status);
      return true;
    }
    for (double longest = longest_leap();; longest = longest * 0.5) {
      if (longest < kWorthwhile / total) return false;
      if (try_leap(longest, critical, status)) return true;
    }
  }

  // The least double beyond x: what is "before" it is at x or earlier.
  static double following(double x) {
    if (x == 0.0) return as_real(1);
    return as_real(x > 0.0 ? as_word(x) + 1 : as_word(x) - 1);
  }

  // One leap of at most `longest`; false if it would make a count negative.
  bool try_leap(double longest, double critical, Status& status) {
    const uint64_t pass = static_cast<uint64_t>(t_.passes++);
    const uint64_t trajectory = run_.first + static_cast<uint64_t>(t_.row);
    ++t_.quiet;
    const auto u = uniforms<double>(pass, trajectory, run_.seed, run_.stream);
    const double grid = run_.times[t_.grid], end = grid < t_.next_break ? grid : t_.next_break;
    double length = critical > 0.0 ? -log_of_normal(u.time) / critical : kInfinity;
    const bool fires_critical = length <= longest && now() + length < end;
    if (!fires_critical) length = longest;
    const bool to_end = !(now() + length < end);
    if (to_end) length = end - now();

    for (int32_t s = 0; s < net_.species; ++s) change_[s] = 0.0;
    double firings = 0.0;
    const Draws draws = {pass, trajectory, run_.seed, run_.stream};
    for (int32_t j = 0; j < net_.reactions; ++j) {
      if (fired_[j] < 0.0 || laws_[j] == 0.0) continue;
      const double k = poisson(laws_[j] * length, draws, static_cast<uint32_t>(j));
      firings += k;
      add_change(j, k);
    }
    if (fires_critical) {
      firings += 1.0;
      add_change(chosen_critical(u.choice * critical), 1.0);
    }
    for (int32_t s = 0; s < net_.species; ++s)
      if (values_[s] + change_[s] < 0.0) return false;
    for (int32_t s = 0; s < net_.species; ++s) values_[s] += change_[s];
    t_.quiet -= static_cast<int64_t>(firings);
    now() = to_end ? end : now() + length;
    status = arrive(to_end && end == t_.next_break);
    return true;
  }

  void add_change(int32_t j, double times) {
    for (int32_t c = net_.change_start[j]; c < net_.change_start[j + 1]; ++c)
      change_[net_.change_slot[c]] += times * static_cast<double>(net_.change_delta[c]);
  }

  int32_t chosen_critical(double target) const {
    double sum = 0.0;
    int32_t last = 0;
    for (int32_t j = 0; j < net_.reactions; ++j) {
      if (!(fired_[j] < 0.0)) continue;
      sum = sum + laws_[j];
      last = j;
      if (sum > target) break;
    }
    return last;
  }

  Status arrive(bool at_break) {
    for (int32_t s = 0; s < net_.species; ++s)
      if (values_[s] > kLargestCount) return kOverflow;
    if (at_break) t_.next_break = next_break(net_, values_, 1, now());
    return after_jump(net_, run_, t_, values_, 1);
  }

  const Network& net_;
  const Ensemble& run_;
  double *values_, *laws_, *fired_, *mean_, *variance_, *consumed_, *change_, *order_, *copies_;
  Trajectory t_;
};

int64_t tau_scratch(const Network& net) { return Leaper::scratch_bytes(net); }

void tau(const Network& net, const Ensemble& run, void* scratch) {
  Leaper(net, run, static_cast<double*>(scratch)).work();
}

void poisson_numbers(double mean, uint32_t seed, double* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = poisson(mean, {0, static_cast<uint64_t>(i), seed, 0}, 0);
}

}  // namespace

const SsaTauKernels ssa_tau_kernels = {tau_scratch, tau, poisson_numbers};

PYGEN_END_LEVEL
