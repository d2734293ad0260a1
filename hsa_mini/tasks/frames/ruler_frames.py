"""RULER's own wordings (arXiv 2404.06654), so that a model can be trained with or without them."""

NOUN = "special magic {type}"
TOLD = "One of the {nouns} for {key} is: {value}."

CHAIN = (
    "VAR {a} = {value}\n", "VAR {b} = VAR {a}\n",
    "Question: Find all variables that are assigned the value {value} in the text above.",
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables "
    "are assigned the value {value}, they are: {names}\n",
)  # fmt: skip
QUESTION = "What is the {noun} for {key} mentioned in the provided text?"
LEAD = "The {noun} for {key} mentioned in the provided text is {value}."
SEVERAL = "What are all the {nouns} for {keys} mentioned in the provided text?"
# The answer names the keys again. RULER asks only that it holds all values.
SEVERAL_LEAD = (
    "The {nouns} for {keys} mentioned in the provided text are",
    " {key}: {value}", ", {key}: {value}", ".",
)  # fmt: skip
ALL = "What are all the {nouns} for {key} mentioned in the provided text?"
ALL_LEAD = "The {nouns} for {key} mentioned in the provided text are {values}."
