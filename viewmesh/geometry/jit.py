"""How this package's loops are compiled: scalar code over numpy arrays that releases the GIL.

The only importer of numba here.
"""

import numba

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
inline = numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
