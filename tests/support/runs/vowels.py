"""A reward for tests: the share of vowels."""


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
