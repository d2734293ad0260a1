"""The questions about facts.

A question consists of what is asked and of a lead, which the answer ends. The answer starts at the
lead's last slot.
"""

from hsa_mini.tasks.frames.frame import Frames

# The first needle's question.
ASKED = "What is the {noun} of {key}?"
LEAD = "The {noun} of {key} is {value}."

_WHAT = (
    "«the {noun} of {key}|the {noun} for {key}|{key}'s {noun}|the {noun} that belongs to {key}"
    "|the {noun} given to {key}|the {noun} which {key} has|the {noun} with the name {key}"
    "|the {noun} in the case of {key}|the {noun} of the one called {key}|the value for {key}"
    "|what {key} has|what was said of {key}|the entry {key}»"
)
_OPENING = (
    "«|||||Question: |Q: |User: |Now: |Then |So, |Hello, |Exercise: |Task: |# |And |But |Once "
    "more: »"
)
_PLEASE = (
    "«what is|which is|what was|tell me|give me|find|write|say|name|show|recall|repeat|look for"
    "|do you know|can you find|could you tell us|I want to know|we need|he asks for|print|return"
    "|let us see|remember|who knows|try to find|copy|answer with|where is»"
)
_WHERE = (
    "«?|?|?|.|.|:|| in the text above?| above.| again?| in the story?| here?|, if you know it?»"
)
QUESTION = Frames(
    (
        f"{_OPENING}{_PLEASE} {_WHAT}{_WHERE}",
        f"{_OPENING}{_PLEASE} {_WHAT}{_WHERE}",
        f"{_OPENING}{_PLEASE} {_WHAT}{_WHERE}",
        f"{_OPENING}{_PLEASE} {_WHAT}{_WHERE}",
        f"{_OPENING}«which|what» {{noun}} «does {{key}} have|has {{key}}|did {{key}} get|belongs "
        f"to "
        f"{{key}}|was given to {{key}}|goes with {{key}}|stands by {{key}}|is that of {{key}}|do "
        f"we "
        f"read for {{key}}|did the text give for {{key}}|do you know for {{key}}|is "
        f"{{key}}'s»{_WHERE}",
        f"{_OPENING}{{key}} «has which|uses what|and the|, the|with which|by which|needs a» "
        f"{{noun}}?",
        f"«For|About|As for|Of|With» {{key}}, {_PLEASE} «the {{noun}}|it|that»{_WHERE}",
        "What is the {noun} of {key}?",
        "What is the {noun} for {key}?",
        "What is {key}'s {noun}?",
        "Which {noun} does {key} have?",
        "Which {noun} belongs to {key}?",
        "Which {noun} was given to {key}?",
        "Tell me the {noun} of {key}.",
        "Give the {noun} of {key}.",
        "Find the {noun} for {key} in the text above.",
        "What {noun} is mentioned for {key}?",
        "According to the text, what is the {noun} of {key}?",
        "Do you remember the {noun} of {key}?",
        "For {key}, what is the {noun}?",
        "I need the {noun} of {key}.",
        "Look up {key}.",
        "What about {key}?",
        "{key}?",
        "Question: what is the {noun} of {key}?",
        "Q: {noun} of {key}?",
        "User: Which {noun} is the one of {key}?",
        "# {noun} of {key}",
        "Which value belongs to {key}?",
        "Under which {noun} is {key} known?",
        "What did the text say about {key}?",
        "Repeat what stands next to {key}.",
        "Say which {noun} {key} uses.",
        "The {noun} of {key} was mentioned before. What is it?",
        "Someone asks: what was {key} assigned?",
        "",  # the lead alone
    ),
    (
        "Please state the {noun} that goes with {key}.",
        "How does one reach {key}, that is, with which {noun}?",
        "Can you recall which {noun} the text gives for {key}?",
        "Quiz: {key} has which {noun}?",
        "Let me know the {noun} {key} was registered with.",
        "Earlier a {noun} was stated for {key}; which one was it?",
    ),
)
_SAYS = (
    "«|||||Answer: |A: |Well, |So |As the text says, |I remember that |I think |Of course, |Yes, "
    "|We read that |It says that |Then |Here: |You see, |In the text, |They say |Output: "
    "|By the book |From what we know |If I am right, |As far as I see, |After some thought, "
    "|To be exact, |As for that, |With the list in hand, |From the letters, |In my view »"
)
_IT = (
    "«it|that|this|the answer|the value|the {noun}|the {noun} of {key}|the {noun} for {key}"
    "|{key}'s {noun}|the {noun} that belongs to {key}|the one of {key}|{key}|the one|what {key} has"
    "|the right {noun}|my answer|the text's answer|the {noun} in question|the entry|the result»"
)
_WAS = (
    "«is|is|was|is:|:|=|must be|reads|equals|would be|will be|should be|says|can only be|->|, "
    "namely»"
)
LEADS = Frames(
    (
        f"{_SAYS}{_IT} {_WAS} {{value}}.",
        f"{_SAYS}{_IT} {_WAS} {{value}}.",
        f"{_SAYS}{_IT} {_WAS} {{value}}.",
        f"{_SAYS}{_IT} {_WAS} {{value}}.",
        f'{_SAYS}{_IT} {_WAS} "{{value}}".',
        "«Answer|Output|Result|Solution|Assistant|Bot|He said|Found|Response|Value|Line|Yes»: "
        "{value}\n",
        "The {noun} of {key} is {value}.",
        "The {noun} for {key} is {value}.",
        "{key}'s {noun} is {value}.",
        "The {noun} is {value}.",
        "It is {value}.",
        "Answer: {value}\n",
        "The answer is {value}.",
        "A: {value}\n",
        "Assistant: {value}.",
        "The {noun} of {key}: {value}.",
        "{key}: {value}\n",
        "{key} = {value}\n",
        "{key} has the {noun} {value}.",
        'The {noun} of {key} is "{value}".',
        'Answer: "{value}"\n',
        "That is {value}.",
        "=> {value}\n",
        '"{key}": "{value}"\n',
        "For {key} it is {value}.",
        "The text says that it is {value}.",
        "{noun}: {value}\n",
    ),
    (
        "According to the notes it was {value}.",
        "The one that goes with {key} is {value}.",
        "Reply: {value}\n",
        "The {noun} given for {key} was {value}.",
    ),
)
# The value is known, the key is asked for.
_WHO = (
    "«who|which name|what|which key|whom|which one|whose name|which of them|which entry|which word»"
)
REVERSED = Frames(
    (
        f"{_OPENING}{_WHO} «has|had|got|uses|owns|knows|goes with|comes with|stands by|is given|is "
        f"known by|was found with|was given|carries|received» «the {{noun}} {{value}}|{{value}}"
        f"|the "
        f"value {{value}}|{{value}} as {{noun}}|{{value}} for a {{noun}}»{_WHERE}",
        f"{_OPENING}«to whom|to what|to which name|to which entry» «does|did» «the {{noun}} "
        f"{{value}}"
        f"|{{value}}» belong{_WHERE}",
        f"{_OPENING}{_PLEASE} «the name|the owner|the key|the one|who|the entry» «of|with|behind"
        f"|for"
        f"|that has» «the {{noun}} {{value}}|{{value}}»{_WHERE}",
        f"{_OPENING}«{{value}}|the {{noun}} {{value}}» «belongs to whom|is whose {{noun}}|is "
        f"that of "
        f"whom|goes with what|: whose is it|was given to whom|is from whom|stands for "
        f"what»{_WHERE}",
        f"{_OPENING}«where|if|when|as» «the {{noun}}|it» «is|was|reads» {{value}}, «whose is it"
        f"|who is "
        f"it|which one is meant|what is the name|what is the key|who has it»{_WHERE}",
        "Which name has the {noun} {value}?",
        "To whom does the {noun} {value} belong?",
        "Whose {noun} is {value}?",
        "Who has {value}?",
        "What has the {noun} {value}?",
        "The {noun} {value} is the one of whom?",
        "Which key has the value {value}?",
        "Find the owner of the {noun} {value}.",
        "{value} belongs to what?",
        "Look up {value}.",
        "",
    ),
    (
        "Who was registered with the {noun} {value}?",
        "Name the one that {value} goes with.",
        "If the {noun} is {value}, whose is it?",
    ),
)
REVERSED_LEADS = Frames(
    (
        f"{_SAYS}«it|that|this|the {{noun}}|the {{noun}} {{value}}|{{value}}|this {{noun}}|this "
        f"value"
        f"|that {{noun}}|the one» «belongs to|belonged to|goes with|is the {{noun}} of|was given to"
        f"|comes from|stands by|is that of|was said of|is for|was the one of|is used by|was told of"
        f"|was meant for|stands for|was found with|refers to|is the one for» {{key}}.",
        f"{_SAYS}«it|that|the name|the answer|the owner|the key|the one|this|the name with the "
        f"{{noun}} "
        f"{{value}}|the entry|the word» {_WAS} {{key}}.",
        "«Answer|Output|Result|Name|Solution|Assistant|Owner|Key|He said|Found|Response|Line»: "
        "{key}\n",
        "The {noun} {value} belongs to {key}.",
        "{value} is the {noun} of {key}.",
        "It belongs to {key}.",
        "Answer: {key}\n",
        "{value}: {key}\n",
        "The name with the {noun} {value} is {key}.",
        "It is the {noun} of {key}.",
        "The answer is {key}.",
        "{value} -> {key}\n",
    ),
    ("That {noun} was stated for {key}.", "Reply: {key}\n"),
)
# Several keys at once. {each} repeats its part for each key.
SEVERAL = Frames(
    (
        f"{_OPENING}{_PLEASE} the {{nouns}} «of|for|given to|that belong to» {{keys}}{_WHERE}",
        f"{_OPENING}«which|what» {{nouns}} «do {{keys}} have|belong to {{keys}}|go with {{keys}}"
        f"|were given to {{keys}}|do we read for {{keys}}»{_WHERE}",
        "What are the {nouns} of {keys}?",
        "What are the {nouns} for {keys}?",
        "Tell me the {nouns} of {keys}.",
        "Which {nouns} belong to {keys}?",
        "Find the {nouns} for {keys} in the text above.",
        "For {keys}, what are the {nouns}?",
        "Look up {keys}.",
        "{keys}?",
    ),
    ("Please state the {nouns} that go with {keys}.", "Which {nouns} were stated for {keys}?"),
)
# The lead, the answer for the first key, what follows for each further key, and the end.
SEVERAL_LEADS = (
    ("The {noun} of {key} is", " {value}", ". The {noun} of {key} is {value}", "."),
    ("The {noun} for {key} is", " {value}", ". The {noun} for {key} is {value}", "."),
    ("{key}:", " {value}", "\n{key}: {value}", "\n"),
    ("{key} =", " {value}", ", {key} = {value}", "."),
    ("- {key} has", " {value}", "\n- {key} has {value}", "\n"),
    ("The {nouns} of {keys} are", " {key}: {value}", ", {key}: {value}", "."),
    ("Answer:", " {key}: {value}", ", {key}: {value}", "\n"),
    ("They are", " {key}: {value}", ", {key}: {value}", "."),
    ("They are", " {value} for {key}", ", {value} for {key}", "."),
    ("Answer:", " {value}", ", {value}", "\n"),
)
# All values of one key.
ALL_VALUES = Frames(
    (
        "What are all the {nouns} of {key}?",
        "Which {nouns} does {key} have? Name all of them.",
        "List every {noun} of {key}.",
        "Find all {nouns} for {key} in the text above.",
    ),
    ("Please enumerate each {noun} that goes with {key}.",),
)
ALL_VALUES_LEADS = (
    "The {nouns} of {key} are {values}.",
    "Answer: {values}\n",
    "They are {values}.",
)
