"""Tool calls out of an answer's text: each family of models writes them in its own syntax, a file each.

    syntax = syntax_of(template)                     which syntax a chat template writes; None: none that we know
    stream = ToolStream(syntax, tools)               or FORCED's, where tool_choice demanded a call
    delta = stream.feed(text); ...; stream.finish()  content and calls, in OpenAI's terms

A call is given when all of it has arrived and it can be read. What looks like a call and cannot be read stays content,
character for character, so nothing of an answer is lost.
"""
