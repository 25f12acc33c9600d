"""What is wanted of an order: edit `polite`, or write your own function and name it in config.yaml."""

KIND = {"hello", "good", "would", "may", "please", "thank"}
RUDE = {"hey", "want", "give", "now", "quickly"}


def polite(prompt: str, completions: list[str]) -> list[float]:
    """One number for each completion of `prompt`, higher is better: kind words less rude ones, each counted once.

    A third parameter gets the column of that name: `def polite(prompt, completions, meal)` with a column "meal" in the
    prompts' file.
    """
    answers = [set(completion.split()) for completion in completions]
    return [float(len(words & KIND) - len(words & RUDE)) for words in answers]
