"""A native fuzzer of the CPU backend; see main.cpp and README.md."""
