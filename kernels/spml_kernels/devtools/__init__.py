"""Tools for developers of kernels; nothing that is shipped to users imports them."""
