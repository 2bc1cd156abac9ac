//! Raw rings against the queue: what a hostile driver may write into them.
