"""Which of two answers is better, by a known reward, a reward model or a language model that judges."""
