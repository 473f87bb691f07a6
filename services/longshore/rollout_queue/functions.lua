#!lua name=longshore_@VERSION@

-- Every move of a ticket: its hash, its stream entries and the counters change in one atomic act, so that
-- issued = sum of the states holds at any moment. Owns no policy: Python passes it.
--
-- KEYS of every function: the tickets stream; the other names differ from it in their last word, so that all of them
-- live in the same slot, and are not sent with each call. ARGV[1]: the site whose queue this is.
--
-- What the broker knows of the tickets that are not final is one hash, 'live': by a ticket's key a line of words,
--   <state> <attempt> <site> <tries> <entry> <journal> <nonce> <holder>         queued | running | spooled
--   <state> <attempt> <site> <rollout> <digest> <bytes> <verdict>               awaiting_verdict | delivered
-- where a word that there is none of is '-':
--   attempt   fencing number: grows with every start, and never goes back
--   site      who has it: this site, or the one that leased it, or the one that made its rollout
--   tries     attempts that count against the limit: a drained one does not
--   entry     its entry in the tickets stream, or in the leased stream while another site has it
--   journal   bytes of its journal, a list of finished turns in a key of its own, 't:<key>:journal'
--   nonce     the call that made the newest attempt, so that a repeated call is not a second attempt
--   holder    the actor or the site of the newest attempt; for people
--   rollout, digest, bytes   its entry in the rollouts stream, the payload's digest and size
--   verdict   entry of a verdict that came after its rollout
--
-- One hash, and one line each, because a call costs by the number of arguments of its commands: those of all tickets of
-- a call are read by one command, and written by one. An entry of a rollout has two fields for the same reason:
--   rollout   <schema> <key> <attempt> <site> <awaiting> <codec> <digest>, awaiting its verdict: 1 or 0
--   payload

local ACTORS = 'actors'
local SITES = 'sites'
local LEARNER = 'learner'
local SCHEMA = '1'
local MAX_DEAD_LETTERS = '1000'
-- A larger payload is left out of its dead letter; 1000 of them must not fill the broker.
local MAX_DEAD_PAYLOAD = 256 * 1024

local AT_WORK = {queued = true, running = true, spooled = true}
local AT_LEARNER = {awaiting_verdict = true, delivered = true}

-- Commands that can take many arguments at once; Lua's unpack takes no more than some thousand.
local MOST_ARGUMENTS = 1000

-- What a function changes in tickets and counts, and what it takes out of streams, is put down here and done at its
-- end: once a call, not once a ticket.
local function open_job(keys, args)
  local base = string.match(keys[1], '^(.*)tickets$')
  return {
    tickets = keys[1], leased = base .. 'leased', rollouts = base .. 'rollouts', live = base .. 'live',
    counts = base .. 'counts', epoch = base .. 'epoch', dead = base .. 'dead', reconciled = base .. 'reconciled',
    prefix = base .. 't:', site = args[1], known = {}, changed = {}, changes = {}, dropped = {}, ended = {},
  }
end

local function in_slices(items, act)
  for first = 1, #items, MOST_ARGUMENTS do
    act(unpack(items, first, math.min(#items, first + MOST_ARGUMENTS - 1)))
  end
end

-- '[^ ]+' for a word, for '%S+' takes twice as long.
local function parse(key, line)
  local state = string.match(line, '^[^ ]+')
  if AT_WORK[state] then
    local attempt, site, tries, entry, journal, nonce, holder =
      string.match(line, '^[^ ]+ ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) (.*)$')
    return {
      key = key, state = state, attempt = tonumber(attempt), site = site, tries = tonumber(tries), entry = entry,
      journal = tonumber(journal), nonce = nonce, holder = holder,
    }
  end
  local attempt, site, rollout, digest, bytes, verdict =
    string.match(line, '^[^ ]+ ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+)$')
  return {
    key = key, state = state, attempt = tonumber(attempt), site = site, rollout = rollout, digest = digest,
    bytes = tonumber(bytes), verdict = verdict ~= '-' and verdict or nil,
  }
end

local function line_of(ticket)
  local head = ticket.state .. ' ' .. ticket.attempt .. ' ' .. ticket.site .. ' '
  if AT_WORK[ticket.state] then
    return head .. ticket.tries .. ' ' .. ticket.entry .. ' ' .. ticket.journal .. ' ' .. ticket.nonce .. ' '
      .. ticket.holder
  end
  return head .. ticket.rollout .. ' ' .. ticket.digest .. ' ' .. ticket.bytes .. ' ' .. (ticket.verdict or '-')
end

local function write_tickets(job)
  local lines = {}
  for _, ticket in ipairs(job.changed) do
    if job.known[ticket.key] then
      lines[#lines + 1] = ticket.key
      lines[#lines + 1] = line_of(ticket)
    end
  end
  in_slices(lines, function(...) redis.call('HSET', job.live, ...) end)
  for name, keys in pairs(job.ended) do
    in_slices(keys, function(...)
      redis.call('HDEL', job.live, ...)
      -- At once, next to their deletion: so the append-only file tells how each ticket ended.
      redis.call('HINCRBY', job.counts, name, select('#', ...))
    end)
  end
end

local function settle(job)
  write_tickets(job)
  for _, drops in pairs(job.dropped) do
    in_slices(drops.entries, function(...) redis.call('XACK', drops.stream, drops.group, ...) end)
    in_slices(drops.entries, function(...) redis.call('XDEL', drops.stream, ...) end)
  end
  for name, change in pairs(job.changes) do
    if change ~= 0 then
      redis.call('HINCRBY', job.counts, name, change)
    end
  end
end

-- Returns a refusal for a learner that has been superseded. An epoch above ours is one that we lost with our tail.
local function fence(job, epoch)
  local current = redis.call('GET', job.epoch) or '0'
  if tonumber(epoch) < tonumber(current) then
    return {'fenced', current}
  end
  if tonumber(epoch) > tonumber(current) then
    redis.call('SET', job.epoch, epoch)
  end
  return nil
end

local function change(job, name, by)
  job.changes[name] = (job.changes[name] or 0) + by
end

local function count(job, state, site, by)
  change(job, 'state:' .. state .. '@' .. site, by)
end

-- Reads tickets that `load` will be asked for.
local function fetch(job, keys)
  for first = 1, #keys, MOST_ARGUMENTS do
    local last = math.min(#keys, first + MOST_ARGUMENTS - 1)
    local lines = redis.call('HMGET', job.live, unpack(keys, first, last))
    for i, line in ipairs(lines) do
      local key = keys[first + i - 1]
      if job.known[key] == nil then
        job.known[key] = line and parse(key, line)
      end
    end
  end
end

-- Reads the tickets whose keys are every so many arguments.
local function fetch_each(job, args, first, step)
  local keys = {}
  for i = first, #args, step do
    keys[#keys + 1] = args[i]
  end
  fetch(job, keys)
end

-- Reads the tickets of what was read of a stream.
local function fetch_entries(job, entries)
  local keys = {}
  for _, item in ipairs(entries) do
    keys[#keys + 1] = item[2][2]
  end
  fetch(job, keys)
end

-- A ticket; nil when it is not known, or has ended.
local function load(job, key)
  if job.known[key] == nil then
    fetch(job, {key})
  end
  return job.known[key] or nil
end

local function save(job, ticket)
  if not ticket.is_changed then
    ticket.is_changed = true
    job.changed[#job.changed + 1] = ticket
  end
end

-- Moves a ticket to a state, and to a site, and saves it.
local function move(job, ticket, state, site)
  if state ~= ticket.state or site ~= ticket.site then
    count(job, ticket.state, ticket.site, -1)
    count(job, state, site, 1)
    ticket.state, ticket.site = state, site
  end
  save(job, ticket)
end

-- The ticket, if this attempt still holds it. The entry is compared too: a ticket that was issued again after the
-- broker lost its tail counts its attempts from 1 again.
local function held(job, key, attempt, entry)
  local ticket = load(job, key)
  if ticket and (ticket.state == 'running' or ticket.state == 'spooled') and ticket.attempt == tonumber(attempt)
    and ticket.entry == entry then
    return ticket
  end
  return nil
end

local function drop(job, stream, group, entry)
  local drops = job.dropped[stream]
  if not drops then
    drops = {stream = stream, group = group, entries = {}}
    job.dropped[stream] = drops
  end
  drops.entries[#drops.entries + 1] = entry
end

-- Takes a ticket's entry out of the stream that its workers read.
local function drop_entry(job, ticket)
  if ticket.site == job.site then
    drop(job, job.tickets, ACTORS, ticket.entry)
  else
    drop(job, job.leased, SITES, ticket.entry)
  end
end

local function entry_fields(job, ticket)
  local found = redis.call('XRANGE', ticket.site == job.site and job.tickets or job.leased, ticket.entry, ticket.entry)
  return found[1] and found[1][2]
end

-- The words of a rollout's entry as fields of their own; as it is when it has not the right number of them.
local function opened(fields)
  local found = {}
  for i = 1, #fields, 2 do
    local pattern = '^([^ ]*) [^ ]* ([^ ]*) [^ ]* ([^ ]*) ([^ ]*) ([^ ]*)$'
    local head = fields[i] == 'rollout' and fields[i + 1] or ''
    local schema, attempt, awaiting, codec, digest = string.match(head, pattern)
    local parts = {fields[i], fields[i + 1]}
    if schema then
      parts = {'schema', schema, 'attempt', attempt, 'awaiting', awaiting, 'codec', codec, 'digest', digest}
    end
    for _, part in ipairs(parts) do
      found[#found + 1] = part
    end
  end
  return found
end

-- Copies an entry to the dead letters, with the reason.
local function bury(job, kind, key, site, fields, reason, detail)
  local letter = {'kind', kind, 'key', key, 'site', site, 'reason', reason, 'detail', detail}
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if (name == 'payload' or name == 'verdict') and #value > MAX_DEAD_PAYLOAD then
      name, value = name .. '_bytes', #value
    end
    if name ~= 'key' and name ~= 'site' then
      letter[#letter + 1] = name
      letter[#letter + 1] = value
    end
  end
  redis.call('XADD', job.dead, 'MAXLEN', '~', MAX_DEAD_LETTERS, '*', unpack(letter))
end

local function journal_name(job, ticket)
  return job.prefix .. ticket.key .. ':journal'
end

-- To be saved.
local function forget_journal(job, ticket)
  if ticket.journal > 0 then
    redis.call('DEL', journal_name(job, ticket))
    ticket.journal = 0
  end
end

-- Ends a ticket: only its count remains.
local function finish(job, ticket, outcome)
  if AT_LEARNER[ticket.state] then
    drop(job, job.rollouts, LEARNER, ticket.rollout)
    change(job, 'bytes', -ticket.bytes)
    if ticket.verdict then
      drop(job, job.rollouts, LEARNER, ticket.verdict)
    end
  else
    drop_entry(job, ticket)
    forget_journal(job, ticket)
  end
  local name = 'state:' .. outcome .. '@' .. ticket.site
  local ended = job.ended[name]
  if not ended then
    ended = {}
    job.ended[name] = ended
  end
  ended[#ended + 1] = ticket.key
  job.known[ticket.key] = false
  count(job, ticket.state, ticket.site, -1)
end

-- Ends a ticket that got no rollout: a dead letter for people, a notice on the rollouts stream for the learner.
local function fail(job, ticket, reason, detail)
  local fields = entry_fields(job, ticket) or {}
  fields[#fields + 1] = 'attempt'
  fields[#fields + 1] = ticket.attempt
  bury(job, 'ticket', ticket.key, ticket.site, fields, reason, detail)
  redis.call('XADD', job.rollouts, '*', 'schema', SCHEMA, 'key', ticket.key, 'attempt', ticket.attempt,
    'site', ticket.site, 'final', reason, 'detail', detail)
  finish(job, ticket, reason)
end

-- Puts a running ticket back into the queue.
local function queue_again(job, ticket, tries)
  local entry = redis.call('XADD', job.tickets, '*', unpack(entry_fields(job, ticket)))
  drop_entry(job, ticket)
  ticket.tries, ticket.entry = tries, entry
  move(job, ticket, 'queued', job.site)
end

-- ARGV: .., at_least. Returns the new epoch, above `at_least` and above every earlier one.
local function open_epoch(job, args)
  local current = tonumber(redis.call('GET', job.epoch) or '0')
  local epoch = string.format('%d', math.max(current, tonumber(args[2])) + 1)
  redis.call('SET', job.epoch, epoch)
  return epoch
end

-- ARGV: .., at_least. Returns the epoch that is now in force.
local function raise_epoch(job, args)
  local current = redis.call('GET', job.epoch) or '0'
  if tonumber(args[2]) <= tonumber(current) then
    return current
  end
  redis.call('SET', job.epoch, args[2])
  return args[2]
end

-- ARGV: .., epoch, then (key, payload) of each ticket. Returns {'ok', number of tickets that were not known}.
local function issue(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local issued = 0
  fetch_each(job, args, 3, 2)
  for i = 3, #args, 2 do
    local key, payload = args[i], args[i + 1]
    if not load(job, key) then
      local entry = redis.call('XADD', job.tickets, '*', 'key', key, 'payload', payload)
      local ticket = {
        key = key, state = 'queued', attempt = 0, site = job.site, tries = 0, entry = entry, journal = 0, nonce = '-',
        holder = '-',
      }
      job.known[key] = ticket
      save(job, ticket)
      issued = issued + 1
    end
  end
  change(job, 'issued', issued)
  count(job, 'queued', job.site, issued)
  return {'ok', issued}
end

local function start_one(job, entry, key, actor, nonce, max_attempts)
  local ticket = load(job, key)
  if not ticket or ticket.entry ~= entry or (ticket.state ~= 'queued' and ticket.state ~= 'running') then
    -- It ended or moved on while this entry was on its way.
    drop(job, job.tickets, ACTORS, entry)
    return 0
  end
  if ticket.nonce == nonce then
    return ticket.attempt
  end
  if ticket.tries >= max_attempts then
    fail(job, ticket, 'attempts_exhausted', 'the lease of the last attempt ran out')
    return 0
  end
  ticket.attempt, ticket.tries, ticket.nonce, ticket.holder = ticket.attempt + 1, ticket.tries + 1, nonce, actor
  move(job, ticket, 'running', job.site)
  return ticket.attempt
end

-- ARGV: .., actor, nonce, max_attempts, then (entry, key) of each. Returns an attempt each; 0: nothing to do.
local function start(job, args)
  local attempts = {}
  fetch_each(job, args, 6, 2)
  for i = 5, #args, 2 do
    attempts[#attempts + 1] = start_one(job, args[i], args[i + 1], args[2], args[3], tonumber(args[4]))
  end
  return attempts
end

-- ARGV: .., actor, then (key, attempt, entry) of each. Resets idle times. Returns 1 for each still held, else 0.
local function renew(job, args)
  local kept = {}
  fetch_each(job, args, 3, 3)
  for i = 3, #args, 3 do
    local ticket = held(job, args[i], args[i + 1], args[i + 2])
    if ticket then
      redis.call('XCLAIM', job.tickets, ACTORS, args[2], 0, ticket.entry, 'JUSTID')
    end
    kept[#kept + 1] = ticket and 1 or 0
  end
  return kept
end

-- ARGV: .., key, attempt, entry, max_attempts, whether the attempt counts, whether its journal is kept ('1' | '0'),
-- reason. Returns 1, or 0 when the attempt is no longer held.
local function give_back(job, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 0
  end
  local counts = args[6] == '1'
  local tries = ticket.tries - (counts and 0 or 1)
  if tries >= tonumber(args[5]) then
    fail(job, ticket, 'attempts_exhausted', args[8])
    return 1
  end
  if args[7] == '0' then
    forget_journal(job, ticket)
  end
  queue_again(job, ticket, tries)
  return 1
end

-- ARGV: .., key, attempt, entry, reason, detail. Returns 1, or 0 when the attempt is no longer held.
local function reject(job, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 0
  end
  fail(job, ticket, args[5], args[6])
  return 1
end

-- ARGV: .., key, attempt, entry, index of the turn from 0, payload, the most bytes of a journal.
-- Returns 'ok', or why not: 'taken', 'gap' (turns before it are missing), 'oversized' (the journal is given up).
local function journal(job, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 'taken'
  end
  local name, index = journal_name(job, ticket), tonumber(args[5])
  local turns = redis.call('LLEN', name)
  if index > turns then
    return 'gap'
  end
  if index == 0 then
    forget_journal(job, ticket)
  elseif index < turns then
    redis.call('LTRIM', name, 0, index - 1)
  end
  save(job, ticket)
  if ticket.journal + #args[6] > tonumber(args[7]) then
    forget_journal(job, ticket)
    return 'oversized'
  end
  redis.call('RPUSH', name, args[6])
  ticket.journal = ticket.journal + #args[6]
  return 'ok'
end

-- ARGV: .., key, attempt, entry. Forgets the journal. Returns 1, or 0 when the attempt is no longer held.
local function clear_journal(job, args)
  local ticket = held(job, args[2], args[3], args[4])
  if not ticket then
    return 0
  end
  forget_journal(job, ticket)
  save(job, ticket)
  return 1
end

-- Whether a rollout of this attempt is the one to take: its attempt holds the ticket; or nobody has started anew since
-- (the lease ran out, or the broker lost its tail and with it the start of this attempt).
local function open_to(ticket, attempt, entry)
  if ticket.state == 'queued' then
    return attempt >= ticket.attempt
  end
  if ticket.state == 'running' or ticket.state == 'spooled' then
    return attempt > ticket.attempt or (attempt == ticket.attempt and ticket.entry == entry)
  end
  return false
end

local function deliver_one(job, maker, head, payload)
  local key, attempt, entry, digest, codec, awaiting =
    string.match(head, '^([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([^ ]+) ([01])$')
  local ticket = load(job, key)
  if not ticket then
    return 'gone'
  end
  if not open_to(ticket, tonumber(attempt), entry) then
    return ticket.rollout and ticket.digest == digest and 'repeated' or 'taken'
  end
  local site = maker ~= '' and maker or ticket.site
  local rollout = redis.call('XADD', job.rollouts, '*', 'rollout', SCHEMA .. ' ' .. key .. ' ' .. attempt .. ' '
    .. site .. ' ' .. awaiting .. ' ' .. codec .. ' ' .. digest, 'payload', payload)
  drop_entry(job, ticket)
  forget_journal(job, ticket)
  change(job, 'bytes', #payload)
  ticket.attempt, ticket.rollout, ticket.digest, ticket.bytes = tonumber(attempt), rollout, digest, #payload
  move(job, ticket, awaiting == '1' and 'awaiting_verdict' or 'delivered', site)
  return 'delivered'
end

-- ARGV: .., maker's site or '', then of each 'key attempt entry digest codec awaiting' and payload. Returns of each
-- 'delivered', 'repeated' (these very bytes are there already), or why not: 'gone', 'taken'.
local function deliver(job, args)
  local keys, outcomes = {}, {}
  for i = 3, #args, 2 do
    keys[#keys + 1] = string.match(args[i], '^[^ ]+')
  end
  fetch(job, keys)
  for i = 3, #args, 2 do
    outcomes[#outcomes + 1] = deliver_one(job, args[2], args[i], args[i + 1])
  end
  return outcomes
end

-- ARGV: .., key, verdict. Returns 'delivered', or why not: 'gone', 'taken' (it awaits none).
local function verdict(job, args)
  local ticket = load(job, args[2])
  if not ticket then
    return 'gone'
  end
  if ticket.state ~= 'awaiting_verdict' then
    return 'taken'
  end
  ticket.verdict = redis.call('XADD', job.rollouts, '*', 'schema', SCHEMA, 'key', ticket.key, 'attempt', ticket.attempt,
    'site', ticket.site, 'verdict', args[3])
  move(job, ticket, 'delivered', ticket.site)
  return 'delivered'
end

-- ARGV: .., epoch, then of each 'entry outcome key', where an entry of '-' is none. Returns {'ok'}.
-- The learner is the authority: a ticket ends whatever its state, for a broker that lost its tail may know less.
local function acknowledge(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local keys, entries, outcomes = {}, {}, {}
  for i = 3, #args do
    -- A key comes last: that of a forged entry is any text.
    entries[i - 2], outcomes[i - 2], keys[i - 2] = string.match(args[i], '^([^ ]+) ([^ ]+) (.*)$')
  end
  fetch(job, keys)
  for i, key in ipairs(keys) do
    local ticket = load(job, key)
    if entries[i] ~= '-' and not (ticket and ticket.rollout == entries[i]) then
      drop(job, job.rollouts, LEARNER, entries[i])
    end
    if ticket then
      finish(job, ticket, outcomes[i])
    end
  end
  return {'ok'}
end

-- ARGV: .., epoch, entry, key, reason, detail, task. Returns {'ok'}.
local function dead_letter(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local ticket = load(job, args[4])
  local found = redis.call('XRANGE', job.rollouts, args[3], args[3])
  if found[1] then
    local fields = found[1][2]
    fields[#fields + 1] = 'task'
    fields[#fields + 1] = args[7]
    bury(job, 'rollout', args[4], ticket and ticket.site or '', opened(fields), args[5], args[6])
  end
  if not (ticket and ticket.rollout == args[3]) then
    drop(job, job.rollouts, LEARNER, args[3])
  end
  -- An entry that is not the ticket's own is a forgery or a repeat, and must not end it.
  if ticket and (ticket.rollout == args[3] or ticket.verdict == args[3]) then
    finish(job, ticket, 'rejected')
    return {'ok', 1}
  end
  return {'ok', ticket and 0 or 1}
end

-- ARGV: .., epoch, reason, limit. Ends at most `limit` tickets, so that no call holds the broker for long.
-- Returns {'ok', number left, state, number ended, ...}.
local function close(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local ended, keys = {}, redis.call('HRANDFIELD', job.live, args[4])
  fetch(job, keys)
  for _, key in ipairs(keys) do
    local ticket = load(job, key)
    finish(job, ticket, args[3])
    ended[ticket.state] = (ended[ticket.state] or 0) + 1
  end
  local reply = {'ok', redis.call('HLEN', job.live) - #keys}
  for state, number in pairs(ended) do
    reply[#reply + 1] = state
    reply[#reply + 1] = number
  end
  return reply
end

-- -- between sites ----------------------------------------------------------------------------------------------------

-- Gives a ticket to a site: its entry moves to the leased stream, where actors of this site do not look.
local function lease_one(job, ticket, site, nonce, tries)
  local fields = entry_fields(job, ticket)
  drop_entry(job, ticket)
  local entry = redis.call('XADD', job.leased, '*', unpack(fields))
  redis.call('XCLAIM', job.leased, SITES, site, 0, entry, 'FORCE', 'JUSTID')
  ticket.attempt, ticket.tries, ticket.entry = ticket.attempt + 1, tries, entry
  ticket.nonce, ticket.holder = nonce, site
  forget_journal(job, ticket)
  move(job, ticket, 'running', site)
  return {entry, ticket.attempt, fields}
end

-- How many bytes both begin with, or end with; at most `limit`.
local function shared(one, other, limit, at_end)
  local low, high = 0, math.min(#one, #other, limit)
  while low < high do
    local middle = math.ceil((low + high) / 2)
    local from, to = 1, middle
    if at_end then
      from, to = -middle, -1
    end
    if string.sub(one, from, to) == string.sub(other, from, to) then
      low = middle
    else
      high = middle - 1
    end
  end
  return low
end

-- The tickets of a group are nearly the same: of each but the first only what differs from the one before is sent.
-- Returns {entry, attempt, key, bytes of the payload before that this one begins with, and ends with, the rest} of each.
local function packed(leases)
  local before = ''
  for i, lease in ipairs(leases) do
    local key, payload
    for j = 1, #lease[3], 2 do
      if lease[3][j] == 'key' then
        key = lease[3][j + 1]
      elseif lease[3][j] == 'payload' then
        payload = lease[3][j + 1]
      end
    end
    local head = shared(payload, before, #payload, false)
    local tail = shared(payload, before, math.min(#payload, #before) - head, true)
    leases[i] = {lease[1], lease[2], key, head, tail, string.sub(payload, head + 1, #payload - tail)}
    before = payload
  end
  return leases
end

local function lease_queued(job, site, nonce, limit, max_attempts, leases)
  local found = redis.call('XREADGROUP', 'GROUP', ACTORS, site, 'COUNT', limit, 'STREAMS', job.tickets, '>')
  local entries = found and found[1][2] or {}
  fetch_entries(job, entries)
  for _, item in ipairs(entries) do
    local ticket = load(job, item[2][2])
    if not ticket or ticket.entry ~= item[1] or ticket.state ~= 'queued' then
      drop(job, job.tickets, ACTORS, item[1])
    elseif ticket.tries >= max_attempts then
      fail(job, ticket, 'attempts_exhausted', 'no attempt is left for another site')
    else
      leases[#leases + 1] = lease_one(job, ticket, site, nonce, ticket.tries + 1)
    end
  end
end

local function lease_expired(job, site, nonce, limit, max_attempts, lease_ms, leases)
  local idle = redis.call('XAUTOCLAIM', job.leased, SITES, site, lease_ms, '0-0', 'COUNT', limit)
  fetch_entries(job, idle[2])
  for _, item in ipairs(idle[2]) do
    local ticket = load(job, item[2][2])
    if not ticket or ticket.entry ~= item[1] or (ticket.state ~= 'running' and ticket.state ~= 'spooled') then
      drop(job, job.leased, SITES, item[1])
    elseif ticket.tries >= max_attempts then
      fail(job, ticket, 'attempts_exhausted', 'the lease of the last site ran out')
    else
      leases[#leases + 1] = lease_one(job, ticket, site, nonce, ticket.tries + 1)
    end
  end
end

-- ARGV: .., holder site, nonce, limit, max_attempts, lease in ms. Returns them packed.
-- Another site's lease that ran out is taken over only when nothing is queued: it may still come back with its work.
local function lease(job, args)
  local leases = {}
  lease_queued(job, args[2], args[3], args[4], tonumber(args[5]), leases)
  if #leases == 0 then
    lease_expired(job, args[2], args[3], args[4], tonumber(args[5]), args[6], leases)
  end
  return packed(leases)
end

-- ARGV: .., holder site, nonce, keys. Leases those that are queued, without counting a try. Returns as `lease`.
local function adopt(job, args)
  local leases = {}
  fetch_each(job, args, 4, 1)
  for i = 4, #args do
    local ticket = load(job, args[i])
    if ticket and ticket.state == 'queued' then
      leases[#leases + 1] = lease_one(job, ticket, args[2], args[3], ticket.tries)
    end
  end
  return packed(leases)
end

-- ARGV: .., then (entry, key) of each. Returns the attempt each that the entry stands for; 0: its ticket moved on.
local function attempts(job, args)
  local found = {}
  fetch_each(job, args, 3, 2)
  for i = 2, #args, 2 do
    local ticket = load(job, args[i + 1])
    found[#found + 1] = ticket and ticket.entry == args[i] and ticket.attempt or 0
  end
  return found
end

-- ARGV: .., holder site, then (key, attempt, entry, 'running' | 'spooled') of each. Returns 1 for each held, else 0.
local function renew_site(job, args)
  local kept = {}
  fetch_each(job, args, 3, 4)
  for i = 3, #args, 4 do
    local ticket = held(job, args[i], args[i + 1], args[i + 2])
    if ticket then
      redis.call('XCLAIM', job.leased, SITES, args[2], 0, ticket.entry, 'JUSTID')
      move(job, ticket, args[i + 3], ticket.site)
    end
    kept[#kept + 1] = ticket and 1 or 0
  end
  return kept
end

-- ARGV: .., lease in ms, cursor, limit, max_attempts. Returns {cursor, number of tickets that no site has any more}.
local function expire(job, args)
  local idle = redis.call('XAUTOCLAIM', job.leased, SITES, 'expired', args[2], args[3], 'COUNT', args[4])
  local back = 0
  fetch_entries(job, idle[2])
  for _, item in ipairs(idle[2]) do
    local ticket = load(job, item[2][2])
    if not ticket or ticket.entry ~= item[1] then
      drop(job, job.leased, SITES, item[1])
    else
      if ticket.tries >= tonumber(args[5]) then
        fail(job, ticket, 'attempts_exhausted', 'the lease of the last site ran out')
      else
        queue_again(job, ticket, ticket.tries)
      end
      back = back + 1
    end
  end
  return {idle[1], back}
end

-- -- after a broker lost its tail -------------------------------------------------------------------------------------

-- Changes with every restart of this server, which may have lost the last writes. INFO tells it too, on a page of other
-- things, which is a lot for a link between sites.
local function incarnation()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

-- ARGV: .., keys. Returns 1 for each ticket that the durable frontier covers, else 0; or {'unreconciled'}.
local function covered(job, args)
  if redis.call('GET', job.reconciled) ~= incarnation() then
    return {'unreconciled'}
  end
  local ended = {}
  fetch_each(job, args, 2, 1)
  for i = 2, #args do
    ended[#ended + 1] = load(job, args[i]) and 0 or 1
  end
  return ended
end

local function final_counts(job, args)
  local finals = {}
  if args[4] == 'given' then
    for i = 5, #args, 3 do
      finals['state:' .. args[i + 1] .. '@' .. args[i]] = tonumber(args[i + 2])
    end
    return finals
  end
  local found = redis.call('HGETALL', job.counts)
  for i = 1, #found, 2 do
    local state = string.match(found[i], '^state:(.*)@')
    if state and not AT_WORK[state] and not AT_LEARNER[state] then
      finals[found[i]] = tonumber(found[i + 1])
    end
  end
  return finals
end

-- ARGV: .., epoch, incarnation, 'given' | 'kept', then (site, outcome, number) of each final count. Returns {'ok',
-- issued}, or {'restarted'}: this is another incarnation, which may lack what the one before was told.
-- The counts are made anew from the tickets that are here and these finals; sites may then trust `covered`.
local function reconcile(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  if args[3] ~= incarnation() then
    return {'restarted'}
  end
  local counts, issued, bytes = final_counts(job, args), 0, 0
  local tickets = redis.call('HGETALL', job.live)
  for i = 1, #tickets, 2 do
    local ticket = parse(tickets[i], tickets[i + 1])
    local name = 'state:' .. ticket.state .. '@' .. ticket.site
    counts[name] = (counts[name] or 0) + 1
    bytes = bytes + (ticket.bytes or 0)
  end
  redis.call('DEL', job.counts)
  for name, number in pairs(counts) do
    issued = issued + number
    redis.call('HSET', job.counts, name, number)
  end
  redis.call('HSET', job.counts, 'issued', issued, 'bytes', bytes)
  redis.call('SET', job.reconciled, args[3])
  return {'ok', issued}
end

-- Only what brings in new payloads is refused when the broker's memory is full: everything else helps to free it.
local function register(name, callback, flags)
  local function call(keys, args)
    local job = open_job(keys, args)
    local reply = callback(job, args)
    settle(job)
    return reply
  end
  redis.register_function{function_name = 'longshore_@VERSION@_' .. name, callback = call, flags = flags}
end

register('issue', issue, {})
register('deliver', deliver, {})
register('verdict', verdict, {})
register('journal', journal, {})
register('clear_journal', clear_journal, {'allow-oom'})
register('open_epoch', open_epoch, {'allow-oom'})
register('raise_epoch', raise_epoch, {'allow-oom'})
register('start', start, {'allow-oom'})
register('renew', renew, {'allow-oom'})
register('give_back', give_back, {'allow-oom'})
register('reject', reject, {'allow-oom'})
register('acknowledge', acknowledge, {'allow-oom'})
register('dead_letter', dead_letter, {'allow-oom'})
register('close', close, {'allow-oom'})
register('lease', lease, {'allow-oom'})
register('adopt', adopt, {'allow-oom'})
register('attempts', attempts, {'allow-oom'})
register('renew_site', renew_site, {'allow-oom'})
register('expire', expire, {'allow-oom'})
register('incarnation', incarnation, {'allow-oom'})
register('covered', covered, {'allow-oom'})
register('reconcile', reconcile, {'allow-oom'})
