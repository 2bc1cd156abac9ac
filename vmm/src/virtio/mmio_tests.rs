//! The status machine against a model, and every register against any access.
