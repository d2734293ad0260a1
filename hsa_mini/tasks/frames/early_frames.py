"""Questions that stand far in front of their answers, and what calls for the answers."""

from hsa_mini.tasks.frames.frame import Frames

EARLY = Frames(
    (
        "Answer this at the end: {question}",
        "«Please|Now|First|Today|Friends,|Listen,|Reader,|» «remember|note|keep|take|hear|see|"
        "mark|think of|bear in mind» «this|the following|one question|my question|a riddle» «for "
        "the end|for later|until we are done|while you read|till the text is over|to answer last»: "
        "{question}",
        "«Something|One thing|A point|What» «to find out|to learn|to look for|we want to know|I ask"
        " you|you will need» «in this text|here|below|from what follows|as you read|by the end»: "
        "{question}",
        "«Later|Afterwards|At the end|Behind the text|Finally|In the end» «answer|you should answer"
        "|tell us|say|we ask» «this|the question|the following»: {question}",
        "«The question|My question|What we ask|The task|The exercise|Question 1|To find|To answer» "
        "«is|was|will be|for the end|for later|of this text»: {question}",
        "«Read the text|Look at this text|Here is a text|Mind the text» and «then answer|answer"
        "|tell me|find out|say|reply to»: {question}",
        "At the end of this text you will be asked: {question}",
        "Keep this question in mind: {question}",
        "A question for later: {question}",
    ),
    ("Here is something to answer once you have read everything: {question}",),
)
CALLS = Frames(
    (
        "Now answer the question.",
        "«The text is over|This is the end|You are done|We are through|No more text|That is all|"
        "All was said|Enough» «.|:|;|!| now.» «Reply|Give your answer|Solve it|Say what was asked|"
        "What do you answer|Let us hear it|Your turn|And the answer|Settle what I asked» «.|:|?|| "
        "please.»",
        "«What|Which» «is|was» «the answer|your reply|the solution» to «what I asked|the question "
        "at the start|what you had to find out|the riddle|that question»?",
        "«Now|Here|Well|So|At last|It is time|And now|That was all» «answer|reply to|give the "
        "answer "
        "to|we answer|solve|say the answer to» «the question|what was asked|the task|it|my question"
        "|the exercise|the question above|question 1».",
        "«The answer|Answer|My answer|Reply|The answer to the question|Solution|The reply»«:||.| "
        "now:»",
        "«That was the text|The text ends here|You know the text now|All is read|This was "
        "everything"
        "|The end». «Answer|Answer the question|What is the answer?|Reply now|The answer to the "
        "question:|Your answer|So answer the question from before|Now the question».",
        "Answer to the question that was asked:",
        "What is the answer to the question for later?",
        "End of the text. The answer:",
    ),
    ("You have read everything. Answer the question from before.",),
)

NUMBERED = (
    "Question {number}: ",
    "{number}. ",
    "Task {number}: ",
    "Question no. {number}: ",
    "Q{number}: ",
)
NUMBERED_CALLS = (
    "The answer to question {number}:", "Answer {number}:", "Now answer question {number}.",
    "What is the answer to question {number}?", "A{number}:", "Task {number}:", "Reply to "
    "{number}.",
)  # fmt: skip
