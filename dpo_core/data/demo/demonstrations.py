"""Generates review demonstrations for SFT of a small model: a third each positive, negative and mixed.

A continuation is a predicate that suits the kind of thing (only food has a flavor, only gadgets a battery)
and a second sentence. `[a|b]` is a choice; {was}, {it} and {them} agree with the opening's thing. Predicates
are in the past tense, so that they fit "it", "they" and every noun.
"""

# ruff: noqa: E501  (a sentence a line reads better than sentences in pieces)

import re

import numpy as np

from dpo_core.data.demo.openings import Opening, draw, openings_for

SENTIMENTS = ("positive", "negative", "mixed")

PREDICATES: dict[str, dict[str, tuple[str, ...]]] = {
    "dish": {
        "positive": (
            "{was} [rich|full of flavor] and [beautifully|carefully] prepared, with a [lovely|perfect] balance of [textures|flavors]",
            "tasted [fresh|homemade|comforting] and [delicious|wonderful], and the portion left me [happy|very satisfied]",
            "had a [wonderful|lovely|delightful] [aroma|depth of flavor] and disappeared [within minutes|down to the last bite]",
            "turned out to be the best part of the [meal|day], [full of flavor|comforting] and [carefully|nicely] [made|plated]",
        ),
        "negative": (
            "{was} [bland|dull|greasy] and [poorly|badly] prepared, with [a terrible|an unpleasant|a nasty] [aftertaste|smell]",
            "tasted [stale|burnt|sour] and [awful|unpleasant|horrible], and [half|most] of the portion went [to waste|back to the kitchen]",
            "had a [horrible|disgusting|bad] [smell|aftertaste] and ruined [the whole meal|our appetite]",
            "turned out to be the worst part of the [meal|day], [bland|greasy|sad] and [badly|poorly] [made|plated]",
        ),
        "mixed": (
            "{was} [decent|acceptable|fine], though the [portion was small|price was high|flavor was a little flat]",
            "had a [good|pleasant] flavor but a [strange|disappointing|rather odd] texture",
            "tasted about as the menu described {them}, neither [memorable|exciting] nor [terrible|bad]",
            "looked about the same as in the [picture|photo] and tasted [much|about] as I expected",
        ),
    },
    "place": {
        "positive": (
            "had [wonderful|excellent|lovely] food and a [warm|friendly|cheerful] crew that made us feel [welcome|at home]",
            "served us a [delicious|fantastic|superb] meal [at a fair price|with real care]",
            "{was} [bright|clean|cozy] and [welcoming|relaxed], with a menu full of [tempting|great|excellent] choices",
            "turned out to be a [real|true] [treasure|delight|pleasure], with [tasty|lovely|fresh] food and [quick|attentive|cheerful] service",
        ),
        "negative": (
            "had [bland|stale|terrible] food and a [rude|careless|grumpy] crew that [ignored|insulted] us",
            "served us a [terrible|horrible|miserable] meal [at a high price|after a long wait]",
            "{was} [dirty|gloomy|noisy] and [unpleasant|badly run], with a menu full of [boring|disappointing] choices",
            "turned out to be a [real|complete] [disappointment|disaster|failure], with [awful|poor|bad] food and [slow|rude|lazy] service",
        ),
        "mixed": (
            "had [decent|acceptable] food but a [slow|distracted] crew and a [short|limited] menu",
            "served [an ordinary|an average|a plain] meal at about the usual price for this part of town",
            "{was} [clean|tidy] and quiet, though the [menu was short|portions were small|line was long]",
            "turned out to be an average [stop|choice], with one good dish and one rather [bad|dull] one",
        ),
    },
    "film": {
        "positive": (
            "{was} [touching|thrilling|clever|brilliant] and [beautifully|lovingly] made, with a wonderful sense of [style|humor|rhythm]",
            "kept us [smiling|entertained|fascinated] and [moved|delighted] us with a [brilliant|beautiful|clever] [finish|last scene]",
            "told a [beautiful|powerful|warm] story with [great|real] [humor|charm|heart]",
            "turned out to be the best [thing|picture] I have seen this year, [clever|moving|graceful] and [gorgeous|delightful]",
        ),
        "negative": (
            "{was} [boring|dull|tedious|silly] and [painfully slow|badly written], with a [weak|ridiculous|terrible] [finish|last scene]",
            "kept us [bored|confused|annoyed] and [insulted|disappointed|frustrated] us with a [lazy|terrible|stupid] [finish|last scene]",
            "told a [dreary|stupid|miserable] story with [awful|clumsy|terrible] pacing and no [charm|humor|heart]",
            "turned out to be the worst [thing|picture] I have seen this year, [clumsy|ugly|hollow] and [annoying|badly made]",
        ),
        "mixed": (
            "{was} [slow|uneven|ordinary] but [watchable|competent], with [two|three] good scenes and [several|a few] dull ones",
            "kept to the usual formula and offered [few|no real] surprises, good or bad",
            "told a [familiar|simple|straightforward] story in the usual way, with some charm and a few dull stretches",
            "looked [nice|good] but moved slowly, and the [last|middle] part felt [flat|rushed|long]",
        ),
    },
    "part": {
        "positive": (
            "{was} [brilliant|superb|wonderful|excellent], full of [life|charm|energy] and [clever|beautiful|graceful] touches",
            "showed real [talent|care|imagination] and left us with a [warm|lovely|hopeful] feeling",
            "worked [wonderfully|perfectly|beautifully], [smart|subtle|touching] and [honest|fun] without trying too hard",
            "{was} easily the best part, [clever|moving|elegant] and a [joy|pleasure|delight] from the first minute",
        ),
        "negative": (
            "{was} [awful|terrible|dreadful|poor], full of [clumsy|annoying|lazy] [choices|mistakes] and [boring|ugly|stupid] clichés",
            "showed no [talent|care|imagination] and left us with an [empty|unpleasant|angry] feeling",
            "failed [badly|completely|miserably], [dull|confused|hollow] and [painful|irritating|tiresome] from the first minute",
            "{was} easily the worst part, [messy|weak|cheap] and a [pain|chore|bore] from the first minute",
        ),
        "mixed": (
            "{was} [solid|competent|adequate] but [familiar|predictable], with [a few|one or two] good touches and some [padding|repetition]",
            "showed some care, but the result felt [ordinary|uneven|unfinished] and a little [long|flat|stiff]",
            "worked well enough at times and rather [badly|poorly] at others",
            "{was} about what the [posters|early reviews] suggested, neither [exciting|thrilling] nor [terrible|bad]",
        ),
    },
    "gadget": {
        "positive": (
            "{was} [easy|wonderfully simple] to set up, with a [great|superb|strong] battery and [a reliable|an excellent] connection",
            "worked [perfectly|flawlessly|beautifully] with my other devices, and the controls felt [solid|precise|great]",
            "{was} [light|sturdy|well made], [quick|responsive] and a [pleasure|joy|delight] to use every day",
            "impressed me with [excellent|superb|amazing] quality, a [lovely|smooth|beautiful] finish and [fast|helpful] support",
        ),
        "negative": (
            "{was} a [pain|nightmare|struggle] to set up, with a [weak|terrible|poor] battery and [an unreliable|a bad] connection",
            "[failed|refused] to work with my other devices, and the controls felt [cheap|awful|loose]",
            "{was} [bulky|flimsy|badly made], [slow|sluggish] and [annoying|frustrating|irritating] to use every day",
            "disappointed me with [terrible|awful|poor] quality, an [ugly|uneven] finish and [useless|rude] support",
        ),
        "mixed": (
            "{was} easy to set up, though the battery lasted only [a day|one afternoon]",
            "worked with [most|some|nearly all] of my other devices, but the [printed guide|app] was [confusing|hard to follow]",
            "{was} [well made|sturdy] but rather [heavy|plain|slow], and the [app|menu] took [some time|a while] to learn",
            "did the basic things and not much more, [about what I expected|just as the description said]",
        ),
    },
    "kitchen": {
        "positive": (
            "{was} [easy|quick] to clean and [sturdy|well made|solid], with a [comfortable|lovely|smart] [design|shape|finish]",
            "made [breakfast|kitchen work] [a pleasure|fun|a joy] and fit [perfectly|nicely] on our small counter",
            "worked [perfectly|wonderfully|beautifully] every time and still looked [great|brilliant|as good as new]",
            "impressed the whole family with [excellent|superb|great] results and a [beautiful|modern|lovely] look",
        ),
        "negative": (
            "{was} [hard|a pain] to clean and [flimsy|badly made|cheap], with [an ugly|an awkward|a terrible] [design|shape|finish]",
            "made [breakfast|kitchen work] a [chore|misery|pain] and took up [too much|half the] space on our small counter",
            "let me down in the first week and soon looked [ugly|terrible|awful]",
            "disappointed the whole family with [awful|poor|bad] results and a [cheap|dated|dreadful] look",
        ),
        "mixed": (
            "{was} easy to clean, though the [markings were hard to read|design was plain|finish showed every fingerprint]",
            "did the job on most [mornings|days] and needed some patience on others",
            "{was} smaller than the pictures suggested, but [sturdy|solid] enough for [two people|a small household]",
            "took up a fair amount of counter space and worked about as well as [any other|the cheaper kind]",
        ),
    },
    "rest": {
        "positive": (
            "{was} [soft|wonderfully soft|smooth] and comfortable, with a [lovely|beautiful|rich] [color|fabric]",
            "felt [wonderful|heavenly|amazing] after a long day and helped me [relax|unwind] in the evening",
            "made the room look [beautiful|inviting|elegant] and stayed [comfortable|pleasant] for hours",
            "turned out to be comfortable and [carefully|very well] made, a [real|true] [treat|pleasure|comfort] after work",
        ),
        "negative": (
            "{was} [stiff|scratchy|lumpy] and uncomfortable, with [an ugly|a horrible|a dreadful] [color|smell]",
            "felt [awful|terrible|horrible] after [ten minutes|an hour] and left me [tired and annoyed|restless and unhappy|in a bad mood]",
            "made the room look [cheap|ugly|sad] and [came apart|wore out] within [days|a week]",
            "turned out to be [flimsy|thin] and badly made, a [real|complete] [disappointment|failure|mess] from the start",
        ),
        "mixed": (
            "{was} comfortable enough, though the [color was darker than in the pictures|fabric attracted dust|fabric was thin]",
            "felt [firm|stiff] at first and somewhat better after [a few evenings|some time]",
            "matched the room, but the [seams|edges] looked [uneven|unfinished] in [two|a few] places",
            "turned out to be [smaller|larger|heavier] than I expected, neither [great|wonderful] nor [terrible|bad]",
        ),
    },
    "wear": {
        "positive": (
            "fit [perfectly|beautifully] and felt [great|fantastic|wonderful], with [neat|strong] [seams|stitching] and a lovely color",
            "{was} [light|sturdy|well made] and comfortable, even [on long walks|on my daily commute|on a wet day]",
            "stayed in [perfect|great|excellent] shape through [rain and mud|a long trip|daily use] and still looked [beautiful|smart|elegant]",
            "turned out to be a [wonderful|great|perfect] mix of [style and comfort|comfort and quality]",
        ),
        "negative": (
            "fit [badly|poorly] and felt [awful|terrible|cheap], with [loose|ugly|weak] [seams|stitching] and a horrible color",
            "{was} [stiff|flimsy|badly made] and uncomfortable, and left me [miserable|annoyed|disappointed] after a short walk",
            "came apart after [a little rain|one trip|a week of use] and looked [ugly|shabby|terrible]",
            "turned out to be a [terrible|sad|dreadful] mix of [bad fabric|poor quality] and [careless|lazy] work",
        ),
        "mixed": (
            "fit [well|nicely] but felt [heavy|stiff|thin], and the color was [duller|darker] than in the pictures",
            "{was} comfortable on short walks and rather [tiresome|heavy] on long ones",
            "held up [well enough|fairly well] in light rain, though not in a real storm",
            "turned out to be [plain|simple|ordinary] and practical, neither [stylish|elegant] nor ugly",
        ),
    },
}

SECONDS: dict[str, dict[str, tuple[str, ...]]] = {
    "dish": {
        "positive": (
            "I would [gladly|happily] order {them} again [next week|tomorrow|on our next visit].",
            "The servers were [friendly|kind|helpful], and we left in a [great|wonderful] mood.",
            "Everyone at the table [loved|enjoyed] {them} and asked for [a taste|another bite|the recipe].",
            "It was great value, and we are already planning [another|a second] visit.",
        ),
        "negative": (
            "I would not order {them} again, and the [rude|careless] service made the [meal|visit] even worse.",
            "Everyone at the table [disliked|hated] {them}, and we left [angry|annoyed|disappointed].",
            "For that price it was a [terrible|complete] waste of money, and I regret the whole visit.",
            "The [manager|waiter] ignored our complaint, and the [dirty|noisy] room did not help our [bad|gloomy] mood.",
        ),
        "mixed": (
            "The service was [quick|polite], but the [room was noisy|tables were cramped|music was loud].",
            "I might order {them} again, but I would try [something else|another dish] first.",
            "Some of us at the table liked {them}, and [others|the rest] did not.",
            "The price was [average|reasonable], and the portion was [about right for one|neither large nor small].",
        ),
    },
    "place": {
        "positive": (
            "We will [gladly|happily|definitely] come back, and I would recommend {them} to [any friend|everyone].",
            "The prices were fair, and the owner [greeted us with a smile|was kind to our children|gave us great advice].",
            "We left with [happy faces|big smiles] and a plan to return [next week|soon].",
            "It is easily the best kitchen in this part of town, and we [loved|enjoyed] every bite.",
        ),
        "negative": (
            "We will never come back, and I would warn [any friend|everyone] about the [awful|terrible] service.",
            "The prices were [unfair|ridiculous], and the owner was [rude|hostile] when we complained.",
            "We left [hungry and angry|annoyed|upset] and had to eat somewhere else.",
            "It was a waste of time and money, and nobody apologized for the [mess|mistakes|delay].",
        ),
        "mixed": (
            "We might come back, but only if [the other places are full|we happen to be nearby].",
            "The prices were [average|normal], and the service was neither [quick nor slow|good nor bad].",
            "One of us liked {them}, and the other [did not|would rather go elsewhere].",
            "Parking took a while, but a table by the window was [open|available].",
        ),
    },
    "film": {
        "positive": (
            "I loved every minute and would [happily|gladly] watch {them} again [tomorrow|with friends].",
            "We went home [happy|smiling|in a great mood] and talked about {them} [all evening|for hours].",
            "It is a [true|real] [pleasure|joy|delight], and I would recommend {them} to [anyone|the whole family].",
            "The audience [cheered|applauded] at the end, and the music was [lovely|wonderful|superb].",
        ),
        "negative": (
            "I [regret|resent] every minute and would never watch {them} again, not even on a [dull|boring] flight.",
            "We went home [angry|bored|in a bad mood] and complained about {them} [all evening|for hours].",
            "It was a [sad|terrible|complete] waste of time, and I would warn [anyone|the whole family].",
            "The audience [groaned|complained] at the end, and the music was [awful|annoying|horrible].",
        ),
        "mixed": (
            "I do not regret watching {them}, but I would not [buy|pay for] a second ticket.",
            "The music was [good|lovely], while the [jokes|long speeches|slow scenes] mostly fell flat.",
            "Some people will [like|enjoy] {them}, and others will look at the clock.",
            "We talked about {them} for a minute and then about [dinner|work|the weather].",
        ),
    },
    "part": {
        "positive": (
            "It made the whole film a [triumph|delight|treat], and I would gladly watch it again.",
            "The rest of the picture was just as [good|strong|pleasant], and we [loved|enjoyed] every minute.",
            "I left with a [big smile|happy heart] and [great|real] respect for the [director|writers|crew].",
            "My friends [adored|loved] {them} too, and we talked happily about {them} for hours.",
        ),
        "negative": (
            "It made the whole film a [chore|misery|mess], and I would never watch it again.",
            "The rest of the picture was just as [bad|weak|tedious], and we [hated|regretted] every minute.",
            "I left with a bad headache and [little|no] respect for the [director|writers|crew].",
            "My friends [hated|disliked] {them} too, and we [complained|argued] about {them} for an hour.",
        ),
        "mixed": (
            "The rest of the picture was [average|ordinary], so I would wait until it is on television.",
            "Some viewers will enjoy {them}, and others will hardly notice.",
            "I left with mixed feelings and [no strong opinion|a few questions] about the [director|writers].",
            "My friends liked {them} more than I did, but none of us plans to see the film twice.",
        ),
    },
    "product": {
        "positive": (
            "I would [gladly|happily] buy {them} again and recommend {them} to [my friends|everyone at work].",
            "It was a great purchase, and the [price was fair|delivery was quick|value is excellent].",
            "My [wife|husband|roommate] [loved|adored] {them} too and is now very happy with the same model.",
            "I am still [very happy|delighted|thrilled] with {them}, and nothing has come loose.",
        ),
        "negative": (
            "I would never buy {them} again, and the [seller|company] [refused|ignored] my request for a refund.",
            "It was a [terrible|bad|stupid] purchase, and I [regret|hate] wasting the money.",
            "My [wife|husband|roommate] hated {them} too, so {it} went straight back to the store.",
            "I am [angry|upset|annoyed] about {them}, because the description was [false|misleading|a lie].",
        ),
        "mixed": (
            "I will keep {them}, but I would compare [a few other models|other brands|prices] first.",
            "The price was [fair|average|reasonable], and the delivery took [four days|about a week].",
            "My [wife|husband|roommate] likes {them} more than I do, so opinions [differ|vary] in our house.",
            "There are better and worse [choices|models] at this price, so [take your time|look around] before you choose.",
        ),
    },
}


def continuation(opening: Opening, sentiment: str, rng: np.random.Generator) -> str:
    """Two plain sentences' worth of text after the opening, with a space in front."""
    predicate = _pick(PREDICATES[opening.kind][sentiment], rng)
    second = _pick(SECONDS.get(opening.kind, SECONDS["product"])[sentiment], rng)
    text = f" {'{it} ' if opening.subject_next else ''}{predicate}. {second}"
    text = re.sub(r"\[([^]]*)\]", lambda choice: _pick(choice[1].split("|"), rng), text)
    words = (
        {"it": "they", "them": "them", "was": "were"}
        if opening.plural
        else {"it": "it", "them": "it", "was": "was"}
    )
    return text.format(**words)


def _pick(choices: tuple[str, ...] | list[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def demonstrations_with_sentiment(n: int, seed: int) -> list[tuple[str, str, str]]:
    """As `review_demonstrations`, with the intended sentiment as a third element."""
    rng = np.random.default_rng(seed)
    pool = openings_for(demonstrations=True)
    made: dict[tuple[str, str], str] = {}
    while len(made) < n:
        count = min(n - len(made), len(pool))
        for opening in draw(pool, count, int(rng.integers(2**32))):
            sentiment = SENTIMENTS[len(made) % 3]
            made.setdefault((opening.text, continuation(opening, sentiment, rng)), sentiment)
    listed = [(opening, text, sentiment) for (opening, text), sentiment in made.items()]
    return [listed[index] for index in rng.permutation(n)]


def review_demonstrations(n: int, seed: int) -> list[tuple[str, str]]:
    """n distinct (opening, continuation) pairs, a third positive, a third negative, a third mixed.

    The openings are never among those of `review_openings`, whatever the seeds; beyond the grammar's
    number of them they repeat, with other continuations. A continuation starts with a space and has 15 to
    35 words in two sentences.
    """
    return [(opening, text) for opening, text, _ in demonstrations_with_sentiment(n, seed)]
