"""Long texts in several scripts, and a tokenizer that keeps count of what it reads."""

import random
import threading

from transformers import PreTrainedTokenizerBase

# Article 1 of the Universal Declaration of Human Rights.
ARTICLE = {
    "english": "All human beings are born free and equal in dignity and rights. They are endowed with reason"
    " and conscience and should act towards one another in a spirit of brotherhood.",
    "german": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und"
    " Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι προικισμένοι"
    " με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα αδελφοσύνης.",
    "russian": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом"
    " и совестью и должны поступать в отношении друг друга в духе братства.",
    "arabic": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم"
    " بعضا بروح الإخاء.",
    "hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है।",
    "chinese": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과"
    " 양심을 부여받았으며 서로 형제애의 정신으로 행동하여야 한다.",
    "code": "def test(x):\n    if x > 0.5:\n\treturn {'a': [1, 22, 333]}\n\n\n# ----------------\nfor i in range(10_000):"
    " print(f'{i:>8}')\n",
    "emoji": "👩‍👩‍👧‍👦 and 🏳️‍🌈 meet 👍🏽 in 🇩🇪; e\u0301 is é, \u200b\u00a0and \r\n that is all…\n",
}


def writing(script: str, characters: int, seed: int = 0) -> str:
    """A text of so many characters in which nothing comes in the same order twice."""
    draws, text = random.Random(f"{script} {seed}"), ARTICLE[script]
    parts, length = [], 0
    while length < characters:
        start = draws.randrange(len(text))
        parts.append(text[start : start + draws.randint(1, len(text))] + draws.choice(["", "", " ", "\n\n"]))
        length += len(parts[-1])
    return "".join(parts)[:characters]


def counting(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, with a list `read` of the characters and the thread of every text that it tokenizes."""

    class Counting(type(tokenizer)):
        def __call__(self, text, **how):
            self.read.append((len(text), threading.get_ident()))
            return super().__call__(text, **how)

    tokenizer.read = []
    tokenizer.__class__ = Counting
    return tokenizer
