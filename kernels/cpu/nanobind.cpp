// nanobind's own sources, compiled into the module: setup.py names the folder they are in.
#include "nb_combined.cpp"
