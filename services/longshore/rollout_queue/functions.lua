#!lua name=longshore_@VERSION@

-- Every move of a ticket: its hash, its stream entries and the counters change in one atomic act, so that
-- issued = sum of the states holds at any moment. Owns no policy: Python passes it.
--
-- KEYS of every function: the tickets stream; the other names differ from it in their last word, so that all of them
-- live in the same slot, and are not sent with each call. ARGV[1]: the site whose queue this is.
--
-- A ticket's hash exists exactly while the ticket is not final:
--   state     queued | running | spooled | awaiting_verdict | delivered
--   attempt   fencing number: grows with every start, and never goes back
--   tries     attempts that count against the limit: a drained one does not
--   site      who has it: this site, or the one that leased it
--   entry     its entry in the tickets stream, or in the leased stream while another site has it
--   holder    the actor or the site of the newest attempt
--   nonce     the call that made the newest attempt, so that a repeated call is not a second attempt
--   rollout, digest, bytes   its entry in the rollouts stream, the payload's digest and size, once delivered
--   verdict   entry of a verdict that came after its rollout
--   journal   bytes of its journal, a list of finished turns under the hash's name and ':journal'

local ACTORS = 'actors'
local SITES = 'sites'
local LEARNER = 'learner'
local MAX_DEAD_LETTERS = '1000'
-- A larger payload is left out of its dead letter; 1000 of them must not fill the broker.
local MAX_DEAD_PAYLOAD = 256 * 1024

-- Commands that can take many arguments at once; Lua's unpack takes no more than some thousand.
local MOST_ARGUMENTS = 1000

-- What a function changes in the counts, and what it takes out of streams and of the active set, is put down here and
-- done at its end: once a call, not once a ticket.
local function open_job(keys, args)
  local base = string.match(keys[1], '^(.*)tickets$')
  return {
    tickets = keys[1], leased = base .. 'leased', rollouts = base .. 'rollouts', active = base .. 'active',
    counts = base .. 'counts', epoch = base .. 'epoch', dead = base .. 'dead', reconciled = base .. 'reconciled',
    prefix = base .. 't:', site = args[1], changes = {}, dropped = {}, ended = {}, has_ended = {},
  }
end

local function in_slices(items, act)
  for first = 1, #items, MOST_ARGUMENTS do
    act(unpack(items, first, math.min(#items, first + MOST_ARGUMENTS - 1)))
  end
end

local function settle(job)
  for _, drops in pairs(job.dropped) do
    in_slices(drops.entries, function(...) redis.call('XACK', drops.stream, drops.group, ...) end)
    in_slices(drops.entries, function(...) redis.call('XDEL', drops.stream, ...) end)
  end
  in_slices(job.ended, function(...) redis.call('SREM', job.active, ...) end)
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

local function load(job, key)
  local name = job.prefix .. key
  local found = redis.call('HMGET', name, 'state', 'attempt', 'tries', 'site', 'entry', 'nonce', 'rollout', 'digest',
    'bytes', 'verdict', 'journal')
  if not found[1] or job.has_ended[key] then
    return nil
  end
  return {
    key = key, name = name, state = found[1], attempt = tonumber(found[2]), tries = tonumber(found[3]),
    site = found[4], entry = found[5], nonce = found[6], rollout = found[7], digest = found[8],
    bytes = tonumber(found[9] or '0'), verdict = found[10], journal = tonumber(found[11] or '0'),
  }
end

-- Moves a ticket to a state, and to a site.
local function move(job, ticket, state, site)
  if state ~= ticket.state or site ~= ticket.site then
    count(job, ticket.state, ticket.site, -1)
    count(job, state, site, 1)
    redis.call('HSET', ticket.name, 'state', state, 'site', site)
    ticket.state, ticket.site = state, site
  end
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
  local drops = job.dropped[stream] or {stream = stream, group = group, entries = {}}
  drops.entries[#drops.entries + 1] = entry
  job.dropped[stream] = drops
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

local function forget_journal(ticket)
  if ticket.journal > 0 then
    redis.call('DEL', ticket.name .. ':journal')
    redis.call('HDEL', ticket.name, 'journal')
    ticket.journal = 0
  end
end

-- Takes what a ticket has in the rollouts stream out of it.
local function drop_rollout(job, ticket)
  if ticket.rollout then
    drop(job, job.rollouts, LEARNER, ticket.rollout)
    change(job, 'bytes', -ticket.bytes)
  end
  if ticket.verdict then
    drop(job, job.rollouts, LEARNER, ticket.verdict)
  end
end

-- Ends a ticket: only its count remains.
local function finish(job, ticket, outcome)
  if ticket.state == 'delivered' or ticket.state == 'awaiting_verdict' then
    drop_rollout(job, ticket)
  else
    drop_entry(job, ticket)
    forget_journal(ticket)
  end
  redis.call('DEL', ticket.name)
  -- At once, next to its deletion: so the append-only file tells how each ticket ended.
  redis.call('HINCRBY', job.counts, 'state:' .. outcome .. '@' .. ticket.site, 1)
  job.ended[#job.ended + 1] = ticket.key
  job.has_ended[ticket.key] = true
  count(job, ticket.state, ticket.site, -1)
end

-- Ends a ticket that got no rollout: a dead letter for people, a notice on the rollouts stream for the learner.
local function fail(job, ticket, reason, detail)
  local fields = entry_fields(job, ticket) or {}
  fields[#fields + 1] = 'attempt'
  fields[#fields + 1] = ticket.attempt
  bury(job, 'ticket', ticket.key, ticket.site, fields, reason, detail)
  redis.call('XADD', job.rollouts, '*', 'schema', '1', 'key', ticket.key, 'attempt', ticket.attempt,
    'site', ticket.site, 'final', reason, 'detail', detail)
  finish(job, ticket, reason)
end

-- Puts a running ticket back into the queue.
local function queue_again(job, ticket, tries)
  local entry = redis.call('XADD', job.tickets, '*', unpack(entry_fields(job, ticket)))
  drop_entry(job, ticket)
  redis.call('HSET', ticket.name, 'tries', tries, 'entry', entry)
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
  for i = 3, #args, 2 do
    local key, payload = args[i], args[i + 1]
    local name = job.prefix .. key
    if redis.call('EXISTS', name) == 0 then
      local entry = redis.call('XADD', job.tickets, '*', 'key', key, 'payload', payload)
      redis.call('HSET', name, 'state', 'queued', 'attempt', 0, 'tries', 0, 'site', job.site, 'entry', entry)
      redis.call('SADD', job.active, key)
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
  redis.call('HSET', ticket.name, 'attempt', ticket.attempt + 1, 'tries', ticket.tries + 1, 'holder', actor,
    'nonce', nonce)
  move(job, ticket, 'running', job.site)
  return ticket.attempt + 1
end

-- ARGV: .., actor, nonce, max_attempts, then (entry, key) of each. Returns an attempt each; 0: nothing to do.
local function start(job, args)
  local attempts = {}
  for i = 5, #args, 2 do
    attempts[#attempts + 1] = start_one(job, args[i], args[i + 1], args[2], args[3], tonumber(args[4]))
  end
  return attempts
end

-- ARGV: .., actor, then (key, attempt, entry) of each. Resets idle times. Returns 1 for each still held, else 0.
local function renew(job, args)
  local kept = {}
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
    forget_journal(ticket)
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
  local name, index = ticket.name .. ':journal', tonumber(args[5])
  local turns = redis.call('LLEN', name)
  if index > turns then
    return 'gap'
  end
  local bytes = tonumber(redis.call('HGET', ticket.name, 'journal') or '0')
  if index == 0 then
    redis.call('DEL', name)
    bytes = 0
  elseif index < turns then
    redis.call('LTRIM', name, 0, index - 1)
  end
  bytes = bytes + #args[6]
  if bytes > tonumber(args[7]) then
    redis.call('DEL', name)
    return 'oversized'
  end
  redis.call('RPUSH', name, args[6])
  redis.call('HSET', ticket.name, 'journal', bytes)
  return 'ok'
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
  local key, attempt, entry, digest, codec, awaiting = string.match(head, '^(%S+) (%d+) (%S+) (%x+) (%S+) ([01])$')
  local ticket = load(job, key)
  if not ticket then
    return 'gone'
  end
  if not open_to(ticket, tonumber(attempt), entry) then
    return ticket.rollout and ticket.digest == digest and 'repeated' or 'taken'
  end
  local site = maker ~= '' and maker or ticket.site
  local state = awaiting == '1' and 'awaiting_verdict' or 'delivered'
  local rollout = redis.call('XADD', job.rollouts, '*', 'schema', '1', 'codec', codec, 'digest', digest, 'key', key,
    'attempt', attempt, 'site', site, 'awaiting', awaiting, 'payload', payload)
  drop_entry(job, ticket)
  forget_journal(ticket)
  change(job, 'bytes', #payload)
  count(job, ticket.state, ticket.site, -1)
  count(job, state, site, 1)
  redis.call('HSET', ticket.name, 'state', state, 'site', site, 'attempt', attempt, 'rollout', rollout,
    'digest', digest, 'bytes', #payload)
  return 'delivered'
end

-- ARGV: .., maker's site or '', then of each 'key attempt entry digest codec awaiting' (whether it awaits its verdict:
-- 1 or 0) and payload. Returns of each 'delivered', 'repeated' (these very bytes are there already), or why not: 'gone',
-- 'taken'.
local function deliver(job, args)
  local outcomes = {}
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
  local entry = redis.call('XADD', job.rollouts, '*', 'schema', '1', 'key', ticket.key, 'attempt', ticket.attempt,
    'site', ticket.site, 'verdict', args[3])
  redis.call('HSET', ticket.name, 'verdict', entry)
  move(job, ticket, 'delivered', ticket.site)
  return 'delivered'
end

-- ARGV: .., epoch, then (entry or '', key, outcome) of each. Returns {'ok'}.
-- The learner is the authority: a ticket ends whatever its state, for a broker that lost its tail may know less.
local function acknowledge(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  for i = 3, #args, 3 do
    local ticket = load(job, args[i + 1])
    if args[i] ~= '' and not (ticket and ticket.rollout == args[i]) then
      drop(job, job.rollouts, LEARNER, args[i])
    end
    if ticket then
      finish(job, ticket, args[i + 2])
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
    bury(job, 'rollout', args[4], ticket and ticket.site or '', fields, args[5], args[6])
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
  local ended = {}
  for _, key in ipairs(redis.call('SPOP', job.active, args[4])) do
    local ticket = load(job, key)
    if ticket then
      finish(job, ticket, args[3])
      ended[ticket.state] = (ended[ticket.state] or 0) + 1
    end
  end
  local reply = {'ok', redis.call('SCARD', job.active)}
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
  redis.call('HSET', ticket.name, 'attempt', ticket.attempt + 1, 'tries', tries, 'holder', site, 'nonce', nonce,
    'entry', entry)
  forget_journal(ticket)
  move(job, ticket, 'running', site)
  return {entry, ticket.attempt + 1, fields}
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
  for _, item in ipairs(found and found[1][2] or {}) do
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
  for i = 4, #args do
    local ticket = load(job, args[i])
    if ticket and ticket.state == 'queued' then
      leases[#leases + 1] = lease_one(job, ticket, args[2], args[3], ticket.tries)
    end
  end
  return packed(leases)
end

-- ARGV: .., holder site, then (key, attempt, entry, 'running' | 'spooled') of each. Returns 1 for each held, else 0.
local function renew_site(job, args)
  local kept = {}
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
  for i = 2, #args do
    ended[#ended + 1] = 1 - redis.call('EXISTS', job.prefix .. args[i])
  end
  return ended
end

local function final_counts(job, args)
  local finals = {}
  if args[3] == 'given' then
    for i = 4, #args, 3 do
      finals['state:' .. args[i + 1] .. '@' .. args[i]] = tonumber(args[i + 2])
    end
    return finals
  end
  local live = {queued = true, running = true, spooled = true, awaiting_verdict = true, delivered = true}
  local found = redis.call('HGETALL', job.counts)
  for i = 1, #found, 2 do
    local state = string.match(found[i], '^state:(.*)@')
    if state and not live[state] then
      finals[found[i]] = tonumber(found[i + 1])
    end
  end
  return finals
end

-- ARGV: .., epoch, 'given' | 'kept', then (site, outcome, number) of each final count. Returns {'ok', issued}.
-- The counts are made anew from the tickets that are here and these finals; sites may then trust `covered`.
local function reconcile(job, args)
  local refusal = fence(job, args[2])
  if refusal then
    return refusal
  end
  local counts, issued, bytes = final_counts(job, args), 0, 0
  for _, key in ipairs(redis.call('SMEMBERS', job.active)) do
    local ticket = load(job, key)
    if ticket then
      local name = 'state:' .. ticket.state .. '@' .. ticket.site
      counts[name] = (counts[name] or 0) + 1
      bytes = bytes + ticket.bytes
    else
      redis.call('SREM', job.active, key)
    end
  end
  redis.call('DEL', job.counts)
  for name, number in pairs(counts) do
    issued = issued + number
    redis.call('HSET', job.counts, name, number)
  end
  redis.call('HSET', job.counts, 'issued', issued, 'bytes', bytes)
  redis.call('SET', job.reconciled, incarnation())
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
register('renew_site', renew_site, {'allow-oom'})
register('expire', expire, {'allow-oom'})
register('incarnation', incarnation, {'allow-oom'})
register('covered', covered, {'allow-oom'})
register('reconcile', reconcile, {'allow-oom'})
