"""From text to tokens: chat templates, what is learnt of them, and where conversations are cut."""
