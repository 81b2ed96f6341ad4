"""``wardround audit``: attacks on our own private training, reported beside what it promises."""
