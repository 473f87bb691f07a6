#!lua name=longshore_@VERSION@

-- Every move of a ticket: its hash, its stream entries and the counters change in one atomic act, so that
-- issued = sum of the states holds at any moment. Owns no key names and no policy: Python passes both.
--
-- KEYS of every function: tickets stream, leased stream, rollouts stream, active set, counts, epoch, dead letters,
-- reconciled. ARGV[1]: the prefix of the tickets' hashes; ARGV[2]: the site whose queue this is. The prefix carries the
-- hash tag of the keys, so all of them live in the same slot.
--
-- A ticket's hash exists exactly while the ticket is not final:
--   state     queued | running | spooled | awaiting_verdict | delivered
--   attempt   fencing number: grows with every start, and never goes back
--   tries     attempts that count against the limit: a drained one does not
--   site      who has it: this site, or the one that leased it
--   entry     its entry in the tickets stream, or in the leased stream while another site has it
--   holder    the actor or the site of the newest attempt
--   nonce     the call that made the newest attempt, so that a repeated call is not a second attempt
--   rollout, sha256, bytes   its entry in the rollouts stream, the payload's digest and size, once delivered
--   verdict   entry of a verdict that came after its rollout
--   journal   bytes of its journal, a list of finished turns under the hash's name and ':journal'

local ACTORS = 'actors'
local SITES = 'sites'
local LEARNER = 'learner'
local MAX_DEAD_LETTERS = '1000'
-- A larger payload is left out of its dead letter; 1000 of them must not fill the broker.
local MAX_DEAD_PAYLOAD = 256 * 1024

local function open_job(keys, args)
  return {
    tickets = keys[1], leased = keys[2], rollouts = keys[3], active = keys[4], counts = keys[5], epoch = keys[6],
    dead = keys[7], reconciled = keys[8], prefix = args[1], site = args[2],
  }
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

local function count(job, state, site, change)
  if change ~= 0 then
    redis.call('HINCRBY', job.counts, 'state:' .. state .. '@' .. site, change)
  end
end

local function load(job, key)
  local name = job.prefix .. key
  local found = redis.call('HMGET', name, 'state', 'attempt', 'tries', 'site', 'entry', 'nonce', 'rollout', 'sha256',
    'bytes', 'verdict')
  if not found[1] then
    return nil
  end
  return {
    key = key, name = name, state = found[1], attempt = tonumber(found[2]), tries = tonumber(found[3]),
    site = found[4], entry = found[5], nonce = found[6], rollout = found[7], sha256 = found[8],
    bytes = tonumber(found[9] or '0'), verdict = found[10],
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

local function drop(stream, group, entry)
  redis.call('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
end

-- Takes a ticket's entry out of the stream that its workers read.
local function drop_entry(job, ticket)
  if ticket.site == job.site then
    drop(job.tickets, ACTORS, ticket.entry)
  else
    drop(job.leased, SITES, ticket.entry)
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
  redis.call('DEL', ticket.name .. ':journal')
end

-- Takes what a ticket has in the rollouts stream out of it.
local function drop_rollout(job, ticket)
  if ticket.rollout then
    drop(job.rollouts, LEARNER, ticket.rollout)
    redis.call('HINCRBY', job.counts, 'bytes', -ticket.bytes)
  end
  if ticket.verdict then
    drop(job.rollouts, LEARNER, ticket.verdict)
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
  redis.call('SREM', job.active, ticket.key)
  count(job, ticket.state, ticket.site, -1)
  count(job, outcome, ticket.site, 1)
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
local function open_epoch(keys, args)
  local job = open_job(keys, args)
  local current = tonumber(redis.call('GET', job.epoch) or '0')
  local epoch = string.format('%d', math.max(current, tonumber(args[3])) + 1)
  redis.call('SET', job.epoch, epoch)
  return epoch
end

-- ARGV: .., at_least. Returns the epoch that is now in force.
local function raise_epoch(keys, args)
  local job = open_job(keys, args)
  local current = redis.call('GET', job.epoch) or '0'
  if tonumber(args[3]) <= tonumber(current) then
    return current
  end
  redis.call('SET', job.epoch, args[3])
  return args[3]
end

-- ARGV: .., epoch, then (key, payload) of each ticket. Returns {'ok', number of tickets that were not known}.
local function issue(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[3])
  if refusal then
    return refusal
  end
  local issued = 0
  for i = 4, #args, 2 do
    local key, payload = args[i], args[i + 1]
    local name = job.prefix .. key
    if redis.call('EXISTS', name) == 0 then
      local entry = redis.call('XADD', job.tickets, '*', 'key', key, 'payload', payload)
      redis.call('HSET', name, 'state', 'queued', 'attempt', 0, 'tries', 0, 'site', job.site, 'entry', entry)
      redis.call('SADD', job.active, key)
      issued = issued + 1
    end
  end
  if issued > 0 then
    redis.call('HINCRBY', job.counts, 'issued', issued)
    count(job, 'queued', job.site, issued)
  end
  return {'ok', issued}
end

local function start_one(job, entry, key, actor, nonce, max_attempts)
  local ticket = load(job, key)
  if not ticket or ticket.entry ~= entry or (ticket.state ~= 'queued' and ticket.state ~= 'running') then
    -- It ended or moved on while this entry was on its way.
    drop(job.tickets, ACTORS, entry)
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
local function start(keys, args)
  local job = open_job(keys, args)
  local attempts = {}
  for i = 6, #args, 2 do
    attempts[#attempts + 1] = start_one(job, args[i], args[i + 1], args[3], args[4], tonumber(args[5]))
  end
  return attempts
end

-- ARGV: .., actor, then (key, attempt, entry) of each. Resets idle times. Returns 1 for each still held, else 0.
local function renew(keys, args)
  local job = open_job(keys, args)
  local kept = {}
  for i = 4, #args, 3 do
    local ticket = held(job, args[i], args[i + 1], args[i + 2])
    if ticket then
      redis.call('XCLAIM', job.tickets, ACTORS, args[3], 0, ticket.entry, 'JUSTID')
    end
    kept[#kept + 1] = ticket and 1 or 0
  end
  return kept
end

-- ARGV: .., key, attempt, entry, max_attempts, whether the attempt counts, whether its journal is kept ('1' | '0'),
-- reason. Returns 1, or 0 when the attempt is no longer held.
local function give_back(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[3], args[4], args[5])
  if not ticket then
    return 0
  end
  local counts = args[7] == '1'
  local tries = ticket.tries - (counts and 0 or 1)
  if tries >= tonumber(args[6]) then
    fail(job, ticket, 'attempts_exhausted', args[9])
    return 1
  end
  if args[8] == '0' then
    forget_journal(ticket)
  end
  queue_again(job, ticket, tries)
  return 1
end

-- ARGV: .., key, attempt, entry, reason, detail. Returns 1, or 0 when the attempt is no longer held.
local function reject(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[3], args[4], args[5])
  if not ticket then
    return 0
  end
  fail(job, ticket, args[6], args[7])
  return 1
end

-- ARGV: .., key, attempt, entry, index of the turn from 0, payload, the most bytes of a journal.
-- Returns 'ok', or why not: 'taken', 'gap' (turns before it are missing), 'oversized' (the journal is given up).
local function journal(keys, args)
  local job = open_job(keys, args)
  local ticket = held(job, args[3], args[4], args[5])
  if not ticket then
    return 'taken'
  end
  local name, index = ticket.name .. ':journal', tonumber(args[6])
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
  bytes = bytes + #args[7]
  if bytes > tonumber(args[8]) then
    redis.call('DEL', name)
    return 'oversized'
  end
  redis.call('RPUSH', name, args[7])
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

-- ARGV: .., key, attempt, entry, sha256, codec, whether it awaits its verdict ('1' | '0'), maker's site or '', payload.
-- Returns 'delivered', 'repeated' (these very bytes are there already), or why not: 'gone', 'taken'.
local function deliver(keys, args)
  local job = open_job(keys, args)
  local ticket = load(job, args[3])
  if not ticket then
    return 'gone'
  end
  if not open_to(ticket, tonumber(args[4]), args[5]) then
    return ticket.rollout and ticket.sha256 == args[6] and 'repeated' or 'taken'
  end
  local site = args[9] ~= '' and args[9] or ticket.site
  local rollout = redis.call('XADD', job.rollouts, '*', 'schema', '1', 'codec', args[7], 'sha256', args[6],
    'key', ticket.key, 'attempt', args[4], 'site', site, 'awaiting', args[8], 'payload', args[10])
  drop_entry(job, ticket)
  forget_journal(ticket)
  local bytes = #args[10]
  redis.call('HSET', ticket.name, 'attempt', args[4], 'rollout', rollout, 'sha256', args[6], 'bytes', bytes)
  redis.call('HINCRBY', job.counts, 'bytes', bytes)
  move(job, ticket, args[8] == '1' and 'awaiting_verdict' or 'delivered', site)
  return 'delivered'
end

-- ARGV: .., key, verdict. Returns 'delivered', or why not: 'gone', 'taken' (it awaits none).
local function verdict(keys, args)
  local job = open_job(keys, args)
  local ticket = load(job, args[3])
  if not ticket then
    return 'gone'
  end
  if ticket.state ~= 'awaiting_verdict' then
    return 'taken'
  end
  local entry = redis.call('XADD', job.rollouts, '*', 'schema', '1', 'key', ticket.key, 'attempt', ticket.attempt,
    'site', ticket.site, 'verdict', args[4])
  redis.call('HSET', ticket.name, 'verdict', entry)
  move(job, ticket, 'delivered', ticket.site)
  return 'delivered'
end

-- ARGV: .., epoch, then (entry or '', key, outcome) of each. Returns {'ok'}.
-- The learner is the authority: a ticket ends whatever its state, for a broker that lost its tail may know less.
local function acknowledge(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[3])
  if refusal then
    return refusal
  end
  for i = 4, #args, 3 do
    local ticket = load(job, args[i + 1])
    if args[i] ~= '' and not (ticket and ticket.rollout == args[i]) then
      drop(job.rollouts, LEARNER, args[i])
    end
    if ticket then
      finish(job, ticket, args[i + 2])
    end
  end
  return {'ok'}
end

-- ARGV: .., epoch, entry, key, reason, detail, task. Returns {'ok'}.
local function dead_letter(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[3])
  if refusal then
    return refusal
  end
  local ticket = load(job, args[5])
  local found = redis.call('XRANGE', job.rollouts, args[4], args[4])
  if found[1] then
    local fields = found[1][2]
    fields[#fields + 1] = 'task'
    fields[#fields + 1] = args[8]
    bury(job, 'rollout', args[5], ticket and ticket.site or '', fields, args[6], args[7])
  end
  if not (ticket and ticket.rollout == args[4]) then
    drop(job.rollouts, LEARNER, args[4])
  end
  -- An entry that is not the ticket's own is a forgery or a repeat, and must not end it.
  if ticket and (ticket.rollout == args[4] or ticket.verdict == args[4]) then
    finish(job, ticket, 'rejected')
    return {'ok', 1}
  end
  return {'ok', ticket and 0 or 1}
end

-- ARGV: .., epoch, reason, limit. Ends at most `limit` tickets, so that no call holds the broker for long.
-- Returns {'ok', number left, state, number ended, ...}.
local function close(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[3])
  if refusal then
    return refusal
  end
  local ended = {}
  for _, key in ipairs(redis.call('SPOP', job.active, args[5])) do
    local ticket = load(job, key)
    if ticket then
      finish(job, ticket, args[4])
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

local function lease_queued(job, site, nonce, limit, max_attempts, leases)
  local found = redis.call('XREADGROUP', 'GROUP', ACTORS, site, 'COUNT', limit, 'STREAMS', job.tickets, '>')
  for _, item in ipairs(found and found[1][2] or {}) do
    local ticket = load(job, item[2][2])
    if not ticket or ticket.entry ~= item[1] or ticket.state ~= 'queued' then
      drop(job.tickets, ACTORS, item[1])
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
      drop(job.leased, SITES, item[1])
    elseif ticket.tries >= max_attempts then
      fail(job, ticket, 'attempts_exhausted', 'the lease of the last site ran out')
    else
      leases[#leases + 1] = lease_one(job, ticket, site, nonce, ticket.tries + 1)
    end
  end
end

-- ARGV: .., holder site, nonce, limit, max_attempts, lease in ms. Returns {entry, attempt, fields} of each.
-- Another site's lease that ran out is taken over only when nothing is queued: it may still come back with its work.
local function lease(keys, args)
  local job = open_job(keys, args)
  local leases = {}
  lease_queued(job, args[3], args[4], args[5], tonumber(args[6]), leases)
  if #leases == 0 then
    lease_expired(job, args[3], args[4], args[5], tonumber(args[6]), args[7], leases)
  end
  return leases
end

-- ARGV: .., holder site, nonce, keys. Leases those that are queued, without counting a try. Returns as `lease`.
local function adopt(keys, args)
  local job = open_job(keys, args)
  local leases = {}
  for i = 5, #args do
    local ticket = load(job, args[i])
    if ticket and ticket.state == 'queued' then
      leases[#leases + 1] = lease_one(job, ticket, args[3], args[4], ticket.tries)
    end
  end
  return leases
end

-- ARGV: .., holder site, then (key, attempt, entry, 'running' | 'spooled') of each. Returns 1 for each held, else 0.
local function renew_site(keys, args)
  local job = open_job(keys, args)
  local kept = {}
  for i = 4, #args, 4 do
    local ticket = held(job, args[i], args[i + 1], args[i + 2])
    if ticket then
      redis.call('XCLAIM', job.leased, SITES, args[3], 0, ticket.entry, 'JUSTID')
      move(job, ticket, args[i + 3], ticket.site)
    end
    kept[#kept + 1] = ticket and 1 or 0
  end
  return kept
end

-- ARGV: .., lease in ms, cursor, limit, max_attempts. Returns {cursor, number of tickets that no site has any more}.
local function expire(keys, args)
  local job = open_job(keys, args)
  local idle = redis.call('XAUTOCLAIM', job.leased, SITES, 'expired', args[3], args[4], 'COUNT', args[5])
  local back = 0
  for _, item in ipairs(idle[2]) do
    local ticket = load(job, item[2][2])
    if not ticket or ticket.entry ~= item[1] then
      drop(job.leased, SITES, item[1])
    else
      if ticket.tries >= tonumber(args[6]) then
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

-- Changes with every restart of this server, which may have lost the last writes.
local function incarnation()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

-- ARGV: .., keys. Returns 1 for each ticket that the durable frontier covers, else 0; or {'unreconciled'}.
local function covered(keys, args)
  local job = open_job(keys, args)
  if redis.call('GET', job.reconciled) ~= incarnation() then
    return {'unreconciled'}
  end
  local ended = {}
  for i = 3, #args do
    ended[#ended + 1] = 1 - redis.call('EXISTS', job.prefix .. args[i])
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
local function reconcile(keys, args)
  local job = open_job(keys, args)
  local refusal = fence(job, args[3])
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
  redis.register_function{function_name = 'longshore_@VERSION@_' .. name, callback = callback, flags = flags}
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
register('covered', covered, {'allow-oom'})
register('reconcile', reconcile, {'allow-oom'})
