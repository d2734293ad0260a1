"""HSA models inside other libraries, and models of other libraries as HSA models.

`huggingface` needs the extra `hf`; nothing else of the package needs these modules.
"""
