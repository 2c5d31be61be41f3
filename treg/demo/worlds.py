"""The worlds of the demo, by name. A world is a module with

MODEL, STEPS                              the folder of its chat model, the steps of its training
LEARNING_RATE                             of preference training
HELD_OUT_PAIRS, SAMPLES                   what the demo measures: pairs, answers to a question
ERRS                                      how the model errs, for a person
ATTRIBUTES, TRUE_VALUES                   what can be true of a town, and what is
question_example, draft, rewritten        what the chat model learns from
preference_rows, prompts, check           what is trained and measured
"""

from types import ModuleType

from treg.demo import rumours, world

WORLDS: dict[str, ModuleType] = {"rumours": rumours, "plain": world}
