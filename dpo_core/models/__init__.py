"""Models: finding, checking, loading, saving and sampling them."""
