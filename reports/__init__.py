"""What a person reads: one self-contained HTML page per plan, predicted beside measured."""
