"""The vocabularies that constants are drawn from: common English words, short in tokens."""

from __future__ import annotations

NOUNS = tuple("""
action area array band base batch block board book box branch buffer byte cache call card case cell center channel
check child chunk city client code color column command comment context copy core count cover data date day degree
depth desk device door edge element entry error event example factor feature field file filter flag flow font force
form frame game grade graph grid group hand hash head header height host image index input item job key label layer
layout leaf length level library light limit line link list lock log loop map margin mark mask match matrix member
memory menu message method mode model module month move name network node note number object offset option order owner
pack package page pair panel parent part path pattern peak phase pipe plan plot point pool port position power prefix
price process product project property query queue range rank record region report request result root round route row
rule sample scale scope score script search season section seed segment sender sequence server service session shape
sheet shift shop side signal site size slot song source space span speed stack stage stamp state station status step
stock store stream string style suffix symbol system table tag tail target task team term test text theme thread
ticket time title token tool topic total trace track trade tree trend trial trip type unit update user value vector
vendor version view visit voice wave week weight wheel widget width window word worker year zone
""".split())
"""For names of functions and classes."""

WORDS = tuple("""
red blue green white black gold pink brown apple lemon peach plum grape melon bread butter sugar salt pepper rice soup
cake honey tea milk water juice table chair lamp door window floor wall roof house garden street bridge river lake
forest mountain valley island beach ocean desert storm rain snow wind sun moon star planet earth fire stone sand iron
silver copper paper pencil book page letter story poem song music piano drum horse tiger lion bear wolf fox mouse
rabbit eagle bird fish whale shark snake frog spider train plane ship boat truck car wheel engine road station ticket
store shop price money coin bank office desk team player game ball goal score winner prize hat coat shirt shoe glove
belt ring watch clock hour minute day night morning summer winter spring doctor nurse teacher student king queen
prince pilot driver sailor baker name user owner guest friend draft open closed ready done error active idle final new
old high low left right north south east west yes stop start
""".split())
"""For strings: words that code compares with, adds or looks for. No word twice, none with a quote in it."""

FIELDS = tuple("""
name price size color age score weight title code level rank year total count status owner speed city team group type
length width height amount label date unit stock rate day hour page email
""".split())
"""For the keys of records, the attributes of objects, the columns of files."""

LETTERS = tuple("abcdefghiklmnoprstuwy")

SEPARATORS = ("-", ";", "|", "/", ":", "+", "#", "~", "_", "=", "*", ".", "&", "@", "!")

NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine",
                10: "ten", 11: "eleven", 12: "twelve"}

TIMES = {2: ("twice", "double"), 3: ("three times", "triple"), 4: ("four times",), 5: ("five times",),
         6: ("six times",), 7: ("seven times",), 8: ("eight times",), 9: ("nine times",), 10: ("ten times",)}

ORDINALS = {1: "first", 2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth"}

MONTHS = {1: "January", 2: "February", 3: "March", 4: "April", 5: "May", 6: "June", 7: "July", 8: "August",
          9: "September", 10: "October", 11: "November", 12: "December"}

WEEKDAYS = {0: "Monday", 1: "Tuesday", 2: "Wednesday", 3: "Thursday", 4: "Friday", 5: "Saturday", 6: "Sunday"}
