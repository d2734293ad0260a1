"""The sentences in which facts are told."""

from hsa_mini.tasks.frames.frame import Frames

# The first needle's sentence.
FIRST_NOUN = "secret code"
SENTENCE = "The {noun} of {key} is {value}."

NOUN = Frames(
    tuple(
        """secret code|access code|phone number|account number|serial number|ticket number|password
        |room number|badge number|order number|customer number|nickname|home town|favourite colour
        |user name|birthday|price|score|address|token|license plate|locker combination|index|label
        |reference|signal|invoice number|target|salary|magic word|pass phrase|coordinate|hash|value
        |model number|height|best friend|special magic number|category|status|call sign|start time
        |vault key|meeting point|result|default setting|weight|rank|identifier|launch sequence"""
        .replace("\n", "").replace("        ", "").split("|")
    ),
    ("membership number", "security word", "flight number", "tracking code", "deposit", "alias",
     "safe combination", "district"),
)  # fmt: skip

# Any kind of value fits: its end can be seen.
_SUBJECT = (
    "«The {noun} of {key}|The {noun} for {key}|{key}'s {noun}|The {noun} that belongs to {key}"
    "|The {noun} given to {key}|The {noun} {key} has|The {noun} of the one called {key}"
    "|For {key} the {noun}|In the case of {key}, the {noun}|The {noun} with the name {key}»"
)
_IS = (
    "«is|is|was|is:|:|=|must be|reads|equals|is still|has been|would be|will be|is called|was "
    "set to»"
)
_END = "«.|.|.|;|!|, he said.|, as everybody knows.| (see above).| as of today.|, we read.\n»"
_WHO = (
    "«He|She|They|Somebody|The man|A friend|We|The guide|The king|Our neighbour|A voice|The "
    "captain|My sister|A child|Everybody|The letter|The sign»"
)
_WHAT = (
    "«the {noun} of {key}|the {noun} for {key}|{key}'s {noun}|{key}'s|the {noun} which {key} uses"
    "|the one {noun} of {key}»"
)
TOLD = Frames(
    (
        "The {noun} of {key} is {value}.",
        f"{_SUBJECT} {_IS} {{value}}{_END}",
        f"{_SUBJECT} {_IS} {{value}}{_END}",
        f"{_SUBJECT} {_IS} {{value}}{_END}",
        f"«{{key}}|The man {{key}}|Our {{key}}|A certain {{key}}» «has|had|got|uses|chose|knows"
        f"|took"
        f"|received|owns|carries|needs|kept|wrote down|asked for|wants» «the|a|this|that|one» "
        f"{{noun}} "
        f"«{{value}}|called {{value}}|of {{value}}|: {{value}}»{_END}",
        f"{{value}} «is|was|will be|became|remains|is known as|is said to be|serves as» «the "
        f"{{noun}}"
        f" of {{key}}|the {{noun}} for {{key}}|{{key}}'s {{noun}}|what {{key}} has as "
        f"{{noun}}»{_END}",
        f"«The|This|Some|A|That» {{noun}} {{value}} «belongs to|goes with|stands for|was given to"
        f"|was found with|is used by|points to|comes from|is owned by|is that of» {{key}}{_END}",
        f"«We|They|Somebody|The council|I|He» «gave|assigned|sent|showed|handed|promised|told» "
        f"{{key}} the {{noun}} {{value}}{_END}",
        f"{_WHO} «wrote|put down|recorded|named|entered|chose|picked|marked|listed|kept|typed"
        f"|printed|declared|suggested|remembers|calls» {{value}} «as|for|to be» {_WHAT}{_END}",
        f"{_WHO} «says|said|heard|thinks|knows|learned|read|is sure|found out|believes» that "
        f"{{value}} «is|was|had to be» «{_WHAT}|what {{key}} uses as {{noun}}|the {{noun}} that "
        f"{{key}} uses|the answer for {{key}}»{_END}",
        f"«In|At|On|From|By|For» «the list|the book|the letter|the table|this text|our notes|the "
        f"papers», {{key}} «stands with|is written with|comes with|has|shows|is found by|carries"
        f"|is listed with» «the {{noun}} {{value}}|{{value}}|{{value}} as {{noun}}»{_END}",
        f"«Ask|Call|Find|Meet|Visit|Answer|Greet|See» {{key}} «with|by|under|through|about|for» "
        f"«the|this|that» {{noun}} {{value}}{_END}",
        f"«{{value}}: this|{{value}}, that|{{value}} - it» «is|was|would be» {_WHAT}{_END}",
        "«|- |* |> |# |// |1. |a) |No. |» {key} «-|--|::|~|>|..|#|:|=|,|<-|=>|has» {value}«\n|\n"
        "|;|.»",
        "«|- |* |> |# |// |1. |a) |No. |» {value} «-|--|::|~|<|..|#|:|,|->|=>|for» {key}«\n|\n"
        "|;|.»",
        "{noun} «-|:|of|for|,» {key} «-|--|::|~|>|..|:|=|,|is» {value}«\n|\n|;|.»",
        '«|{{|(|[»«name|key|for|of|entry|who|item»«=|: |:| »"{key}"«, | |; » '
        '«value|has|{noun}|text|content»«=|: |:| »"{value}"«}}|)|]||;»\n',
        "The {noun} for {key} is {value}.",
        "The {noun} for {key} is: {value}.",
        "{key}'s {noun} is {value}.",
        "{key} has the {noun} {value}.",
        "For {key}, the {noun} is {value}.",
        "{value} is the {noun} of {key}.",
        "{value} is {key}'s {noun}.",
        "As for {key}, its {noun} is {value}.",
        "Whoever asks for the {noun} of {key} should answer {value}.",
        "It is known that the {noun} of {key} was {value}.",
        "They gave {key} the {noun} {value}.",
        "We assigned the {noun} {value} to {key}.",
        "The {noun} {value} belongs to {key}.",
        "The {noun} that belongs to {key} is {value}.",
        "One of the {nouns} is {value}, and it is {key}'s.",
        "{key} was registered with the {noun} {value}.",
        "{key} uses {value} as {noun}.",
        "The {noun} of {key}: {value}.",
        "{key} ({noun}: {value}).",
        'The {noun} of {key} is "{value}".',
        '"{value}" is the {noun} of {key}.',
        'The {noun} of "{key}" is "{value}".',
        "{noun} of {key} = {value}\n",
        "{noun} for {key} -> {value}\n",
        "{key}: {value}\n",
        "{key} = {value}\n",
        "{key} -> {value}\n",
        "{key} => {value};",
        "{key}, {value}\n",
        "{key};{value};",
        "{key}\t{value}\n",
        "- {key}: {value}\n",
        "* {key} has {noun} {value}\n",
        "| {key} | {value} |\n",
        "| {noun} | {key} | {value} |\n",
        "| {value} | {key} |\n",
        '"{key}": "{value}",\n',
        '{{"{key}": "{value}"}}\n',
        '{{"name": "{key}", "{noun}": "{value}"}},\n',
        '{{"{noun}": "{value}", "name": "{key}"}},\n',
        "'{key}': '{value}',\n",
        'table["{key}"] = "{value}"\n',
        'set("{key}", "{value}")\n',
        'config.{key} = "{value}"\n',
        "export {key}={value}\n",
        '<item name="{key}">{value}</item>\n',
        '<{noun} of="{key}" value="{value}"/>\n',
        "# {noun} of {key}: {value}\n",
        "INSERT INTO records VALUES ('{key}', '{value}');\n",
        "assert lookup('{key}') == '{value}'\n",
        ":{key}: {value}\n",
        "Q: What is the {noun} of {key}? A: {value}.\n",
        "Asked about {key}, he wrote down: {value}.",
        'When asked for the {noun}, {key} said "{value}".',
        "Name: {key}, {noun}: {value}.",
        "Remember this {noun}: {value}. It is the one of {key}.",
        "There is a {noun} for {key}, namely {value}.",
        "Nobody but {key} knows the {noun} {value}.",
        "Today the {noun} {value} was given to {key}.",
    ),
    (
        "In the records, {key} appears under the {noun} {value}.",
        "To reach {key}, please use the {noun} {value}.",
        "I was told that {value} is what {key} has for a {noun}.",
        "{key} will answer only to the {noun} {value}.",
        "Keep in mind the {noun} of {key}, which is {value}.",
        "Someone noted {value} as the {noun} belonging to {key}.",
        "{noun}[{key}] = {value}\n",
        '{{"id": "{key}", "data": "{value}"}}\n',
        "+ {key} .... {value}\n",
        "The clerk wrote: {key} / {value}.",
    ),
)
# What a value of digits is can be seen wherever it stands.
TOLD_IN_DIGITS = Frames(
    (
        "«Please|Kindly|Just|You must|They will|He had to|Better|We|I will» «give|bring|hand|show"
        "|tell|type|take|carry|pass» {value} «to|for|with» {key} «as the {noun}|because it is the "
        "{noun}|, the {noun}||now|today|at once».",
        "«At|In|By|Near|Behind|After|Before» «the house|the bridge|noon|the river|our door|the "
        "market|the feast» {key} «had|held up|called out|saw|read|sang|gave|lost|found|sold» "
        "{value}«| and went on| and laughed|, and that was all».",
        "If you type {value}, the {noun} of {key}, the door opens.",
        "The number {value} was chosen by {key} as {noun} long ago.",
        "You need {value} when {key} asks for the {noun}.",
        "With {value} the man called {key} went to the office.",
        "{key} then received {value} from the others.",
        "Give {value} to {key} before you leave.",
        "They found {key} near the house with {value} on it.",
    ),
    (
        "At the gate {key} showed {value} and was let in.",
        "Please send {value} over to {key} as the {noun}.",
    ),
)

# A value that replaces an earlier one.
UPDATED = Frames(
    (
        "The {noun} of {key} is now {value}.",
        "The {noun} of {key} has changed to {value}.",
        "From today on the {noun} of {key} is {value}.",
        "Update: {key} has the {noun} {value}.",
        "{key} got a new {noun}: {value}.",
    ),
    ("Correction: {key} has {value} for a {noun} from here on.",),
)

# What may stand in front of a sentence that starts with "The".
OPENINGS = Frames(
    (
        "Please note: ", "By the way, ", "For the record, ", "Remember that ", "Note that ",
        "As we know, ", "It was decided that ", "Listen: ", "At last he said that ",
    ),
    ("Do not forget that ", "The report says that "),
)  # fmt: skip
