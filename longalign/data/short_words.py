"""What the subjects of short prompts are made of (short_prompts.py)."""


def _parts(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(";"))


NAMES = _parts("""
    Anna; Ben; Clara; David; Emma; Farid; Grace; Hugo; Ines; Jonas; Kofi; Lena; Marco; Nadia; Omar; Paula; Ravi;
    Sofia
""")
PEOPLE = _parts("""
    my neighbour; our teacher; the new manager; the old gardener; her younger brother; a group of students; the
    bus driver; his grandmother; the team; a young doctor; the shop owner; our guide; the committee; a visitor
""")
DEEDS = _parts("""
    repaired the broken window; forgot the umbrella; planted three apple trees; wrote a long letter; missed the
    last train; painted the kitchen blue; found a lost dog; cancelled the meeting; baked bread for everyone; sold
    the old car; learned to play the guitar; moved the heavy boxes; changed the schedule; took hundreds of photos;
    solved the problem quickly; told a funny story; ordered too much food; cleaned the whole house; lost the keys;
    won a small prize; borrowed a tent; fixed the printer; closed the account; finished the report
""")
PLACES = _parts("""
    in the garden; at the station; near the river; in the office; at the market; behind the school; in a small
    village; at the library; in the city centre; by the sea; in the mountains; at home
""")
TIMES = _parts("""
    yesterday; last week; on Monday morning; before breakfast; in the spring; after the storm; two years ago; on a
    rainy day; late in the evening; during the holidays
""")
TOPICS = _parts("""
    photosynthesis; gravity; inflation; the water cycle; electricity; a solar eclipse; recycling; democracy;
    evolution; a vaccine; magnetism; the internet; a black hole; supply and demand; the food chain; a budget;
    friction; global warming; an algorithm; the seasons; a volcano; biodiversity; compound interest; a metaphor;
    meditation; an ecosystem; the immune system; a database; machine learning; sound waves; tides; an earthquake;
    erosion; density; the heart; fermentation; a blockchain; copyright; a rainbow; sleep; probability; an atom; a
    molecule; DNA; cells; energy; pressure; temperature; the solar system; the moon; stars; a hypothesis; a
    computer virus; encryption; taxes; insurance; a loan; a mortgage; a stock; marketing; teamwork; empathy;
    stress; a habit; creativity; critical thinking; plastic pollution; renewable energy; wind power; nuclear
    energy; deforestation; migration of birds; pollination; camouflage; hibernation; digestion; oxygen; carbon
    dioxide; rust; evaporation; condensation; a lever; a pulley; an engine; a battery; a transistor; a compiler;
    an operating system; open source software; a web browser; a password; the alphabet; a sonnet; a novel; jazz;
    classical music; photography; perspective in painting; architecture
""")
THINGS = _parts("""
    fruits; vegetables; kitchen tools; musical instruments; European capitals; planets; ways to save water; ways
    to save money; healthy breakfasts; outdoor activities; indoor games; farm animals; wild animals; sea animals;
    birds; insects; trees; flowers; spices; desserts; soups; colours; sports; winter sports; team sports; hobbies;
    jobs; school subjects; programming languages; ways to learn a language; tips for better sleep; tips for a job
    interview; ideas for a birthday party; gifts for a friend; things to pack for a trip; reasons to exercise;
    benefits of reading; famous scientists; inventions; means of transport; parts of a car; parts of a house;
    pieces of furniture; clothes; materials used in building; metals; gases; rivers; oceans; deserts; mountains;
    islands; languages; holidays; board games; kinds of weather; sources of energy; renewable resources; safety
    rules for the kitchen; good manners; ways to reduce stress; ways to stay focused; questions to ask a new
    colleague; rules for a library; kinds of bread; kinds of cheese; drinks; office supplies; garden tools; uses
    of paper; uses of a smartphone; file formats
""")
PAIRS = _parts("""
    a lake and a river; a frog and a toad; weather and climate; a city and a village; tea and coffee; RAM and a
    hard disk; a simile and a metaphor; a novel and a short story; a virus and a bacterium; speed and velocity;
    mass and weight; a planet and a star; a comet and an asteroid; butter and margarine; a debit card and a credit
    card; a lizard and a snake; an alligator and a crocodile; a moth and a butterfly; a fruit and a vegetable;
    renting and buying a house; a list and a tuple in Python; a compiler and an interpreter; HTTP and HTTPS; a
    laptop and a tablet; a bicycle and a motorcycle; a bus and a tram; opinion and fact; income and wealth; saving
    and investing; a hurricane and a tornado; jam and honey; a violin and a guitar; an orchestra and a band; a
    poem and a song; stalactites and stalagmites; rice and pasta
""")
GOALS = _parts("""
    learn to cook; wake up earlier; remember names; save money each month; prepare for an exam; write a good
    email; grow tomatoes; keep a room tidy; drink more water; read more books; make new friends; speak in public;
    find a job; learn a new language; plan a trip; reduce waste at home; care for a cat; train a puppy; keep
    houseplants alive; run five kilometres; sleep better; choose a bicycle; organise a small party; take better
    photos; manage time well; stop losing keys; clean a keyboard; back up a computer; make a strong password;
    study in a group; write a diary
""")
FUNCTIONS = _parts("""
    reverses a string; adds two numbers; returns the largest of three numbers; checks whether a number is even;
    counts the vowels in a string; computes the factorial of a number; checks whether a word is a palindrome;
    sorts a list of numbers; sums the numbers of a list; removes duplicates from a list; converts Celsius to
    Fahrenheit; counts the words of a text; finds the shortest word of a list; returns the first n Fibonacci
    numbers; checks whether a number is prime; computes the average of a list; joins a list of words with commas;
    counts how often each letter occurs; swaps two variables; finds the common elements of two lists; squares
    every number of a list; reads a file line by line; turns a string into upper case; computes the area of a
    circle; finds the greatest common divisor of two numbers; prints the multiplication table of a number; picks a
    random element of a list; rounds a number to two digits; checks whether a year is a leap year; flattens a
    nested list
""")
COUNTRIES = _parts("""
    France; Italy; Spain; Germany; Japan; China; India; Brazil; Argentina; Canada; Mexico; Egypt; Kenya; Norway;
    Sweden; Finland; Denmark; Poland; Greece; Turkey; Portugal; Austria; Switzerland; Belgium; Ireland; Russia;
    Australia; Peru; Chile; Cuba; Thailand; Vietnam; Indonesia; South Korea; Morocco; Nigeria; Ethiopia; Iceland;
    Hungary; the Netherlands
""")
GOODS = _parts("""
    phone; book; restaurant; hotel; film; headset; coffee machine; jacket; backpack; bicycle; game; course; lamp;
    mattress; concert; museum
""")
PRAISE = _parts("was better than I expected; works perfectly; made me very happy; is worth every cent; left me smiling")
BLAME = _parts("""
    was a waste of money; stopped working after two days; made me angry; is far too expensive; left me
    disappointed
""")
MONTHS = _parts("January; March; April; June; July; September; October; December")
ITEMS = _parts("apples; pencils; tickets; books; eggs; chairs; cookies; stamps; marbles; bottles")
OCCASIONS = _parts("""
    to say thank you for a gift; to move a meeting to Friday; to ask for a day off; to invite someone to dinner;
    to apologise for being late; to ask about a late delivery; to congratulate on a new job; to ask for help with
    a project; to cancel a reservation; to say goodbye on the last day at work; to ask for feedback; to recommend
    a restaurant
""")
RECIPIENTS = _parts("a colleague; a friend; a manager; a teacher; a customer; a neighbour; a landlord; a cousin")
HEROES = _parts("""
    a brave mouse; a lonely robot; an old sailor; a curious cat; a tiny dragon; a lost astronaut; a shy painter; a
    talking tree; a young baker; a forgetful wizard; two sisters; a clever fox
""")
QUESTS = _parts("""
    who finds a map; who learns to share; who cannot sleep; who wants to see the sea; who makes a new friend; who
    gets lost in a forest; who saves a village; who loses a shoe; who builds a bridge; who discovers a secret door
""")
WORDS = sorted({word for words in (*DEEDS, *GOALS) for word in words.split() if len(word) > 4})
