// The few words that the C++ tests are written in: a failed EXPECT prints its place and values, and the program
// returns 1.
#pragma once

#include <cmath>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

inline int failures = 0;

#define EXPECT(condition)                                                              \
  do {                                                                                 \
    if (!(condition)) {                                                                \
      ++failures;                                                                      \
      std::cerr << __FILE__ << ":" << __LINE__ << ": EXPECT(" #condition ") failed\n"; \
    }                                                                                  \
  } while (false)

#define EXPECT_CLOSE(a, b, tolerance)                                                                           \
  do {                                                                                                          \
    const double a_value = (a), b_value = (b);                                                                  \
    if (!(std::fabs(a_value - b_value) <= (tolerance))) {                                                       \
      ++failures;                                                                                               \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " #a " = " << a_value << ", " #b " = " << b_value << "\n"; \
    }                                                                                                           \
  } while (false)

// Whether `action` throws, with `part` in what it says.
inline bool throws_saying(const std::function<void()>& action, const std::string& part) {
  try {
    action();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return true;
    std::cerr << "threw: " << error.what() << "\n";
    return false;
  }
  std::cerr << "did not throw\n";
  return false;
}

struct Test {
  const char* name;
  void (*run)();
};

inline int run_tests(const std::vector<Test>& tests) {
  for (const Test& test : tests) {
    const int before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      ++failures;
      std::cerr << test.name << " threw: " << error.what() << "\n";
    }
    std::cout << (failures == before ? "passed " : "FAILED ") << test.name << "\n";
  }
  return failures == 0 ? 0 : 1;
}
