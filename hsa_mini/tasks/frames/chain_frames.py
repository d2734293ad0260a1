"""Chains, in which a {value} passes from {a} to {b}: head, link, question and lead."""

CHAINS: dict[bool, tuple[tuple[str, str, str, str], ...]] = {
    False: (
        ("The number {value} is given to {a}.", "The number of {a} is given to {b}.",
         "Which names are given the number {value}?", "The number {value} is given to {names}."),
        ("{a} = {value}\n", "{b} = {a}\n",
         "Which variables have the value {value}?", "Answer: {names}\n"),
        ("let {a} be {value};", "let {b} be {a};",
         "Which variables are {value}?", "They are {names}."),
        ("{a} starts with {value}.", "{b} takes what {a} has.",
         "Who has {value}?", "The value {value} is with {names}."),
        ("The box {a} holds {value}.", "The box {b} holds the same as {a}.",
         "Which boxes hold {value}?", "The boxes are {names}."),
        ("{value} -> {a}\n", "{a} -> {b}\n", "Where does {value} lead?", "{value} -> {names}\n"),
        ("{a} := {value}\n", "{b} := {a}\n", "Which names are {value}?", "The names are {names}."),
        ("int {a} = {value};", "int {b} = {a};",
         "Which variables equal {value}?", "Variables: {names}\n"),
        ("{a} was told the number {value}.", "{a} told it to {b}.",
         "Who knows the number {value}?", "The number {value} is known to {names}."),
        ("{a} received the key {value}.", "Then {b} received the key of {a}.",
         "Who had the key {value}?", "The key {value} was with {names}."),
        ("{value} is stored in {a}.", "{a} is copied to {b}.",
         "Where is {value} stored?", "It is stored in {names}."),
        ("{a} follows {value}.",
         "{b} follows {a}.", "Who follows {value}?", "After {value} come {names}."),
        ("# {value}: {a}\n", "# {a}: {b}\n", "All names for {value}?", "Answer: {names}\n"),
        ("{a}({value})\n", "{b}({a})\n", "Which calls lead to {value}?", "Output: {names}\n"),
        ("The price of {a} is {value}.", "The price of {b} is that of {a}.",
         "What costs {value}?", "The price {value} is that of {names}."),
        ("{value} was lent to {a}.", "{a} lent it to {b}.",
         "Who borrowed {value}?", "Borrowers: {names}\n"),
        *(
            (
                "«The number|The code|The parcel|The sum|The word|The message|The ball|The key» "
                "{value} «is given to|goes to|was sent to|is passed to|is held by|came to|was "
                "brought to|fell to» {a}.",
                "«From|After|Behind|With the help of|By» {a} «it goes to|it was passed to|the next "
                "is|comes|it reached|it was brought to|the thing is sent on to» {b}.",
                "«Who|Which names|Whom|Which of them|What people» «has|have|had|held|got|received"
                "|saw|met» «{value}|the number {value}|the code {value}»?",
                "«It|{value}|The number {value}|That» «was with|went to|is with|came to|reached"
                "|passes through» {names}.",
            ),
            (
                "{a} «=|:=|<-|is|equals|holds|has|==|:» {value}«\n|;|.|\n»",
                "{b} «=|:=|<-|is|equals|copies|takes|==|:|reads|has» {a}«\n|;|.|\n»",
                "«Which|What|List the|Name all|Find the» «names|variables|words|entries|cells|keys»"
                " «have|hold|equal|are|with|of|for» {value}«?|.|:»",
                "«Answer|Output|They are|Names|The variables are|Result|Found»«:| =|: |» {names}"
                "«\n|.»",
            ),
            (
                "«put|store|load|move|PUT|MOV|write|send|add|push|give» {value} «to|into|in|->|,|on"
                "|at» {a}«\n|;|.|\n»",
                "«move|send|write|pass|forward|link|point|join|MOV|push|give» {a} «to|into|->|,|on|"
                "with» {b}«\n|;|.|\n»",
                "«Where|In which places|In what|Through which names|At which points» «is|was|did we"
                " put|do we find|stands|came» {value}?",
                "«Answer|In|Through|Places|At|Output»«:|» {names}«\n|.»",
            ),
            (
                "{a} «got|heard|bought|found|read|borrowed|kept|ate|drew|wrote|learned» {value} "
                "«first|one day|long ago|at home|from a friend|at noon».",
                "{b} «got|heard|bought|found|read|borrowed|kept|drew|wrote|learned|has» «it from"
                "|the same from|what was with|that of|the one of|it after» {a}.",
                "«Who|Which people|Whose names» «got|heard|bought|found|had|knew|learned|kept» "
                "{value}?",
                "«These people|They|Those who did|The names|The answer»«:| are| is|, in order:» "
                "{names}«.|\n»",
            ),
        )
        * 3,
    ),
    True: (
        ("The letter {value} went to {a}.", "From {a} the letter went on to {b}.",
         "Who received the letter {value}?", "The letter {value} went to {names}."),
        ("SET {a} {value};", "COPY {a} TO {b};",
         "Which registers hold {value}?", "Reply: {names}\n"),
    ),
}  # fmt: skip
