"""A GPU for machines without one: nvcc's PTX, run on the CPU under a sanitizer. See README.md."""
